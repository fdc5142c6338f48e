"""Made-up photos with conversations about them, of the size and weight of a real corpus. The same for the same seed.

Nothing is downloaded. A picture is a sum of smooth random fields, coarse to fine, with grain on top, so that its JPEG
weighs what a photo's does (30-90 kB at about 500 x 400) and costs as much to decode: flat colour would cost half.
"""

from __future__ import annotations

import io
import json
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from flashsloth import FlashSlothImageProcessor, FlashSlothProcessor
from flashsloth.conversation import SYSTEM
from pipelines.benchmarks.machine import num_cores
from pipelines.scenes.tokenizer import train_tokenizer

IMAGE_TOKENS = 81
_FIELDS = ((3, 70.0), (9, 40.0), (30, 22.0), (90, 12.0))  # cells along the width, strength in grey levels
_VOCABULARY = 4000
_WORDS = 3000
_SYLLABLES = (
    "ba",
    "co",
    "di",
    "fu",
    "ga",
    "ho",
    "ki",
    "lo",
    "me",
    "nu",
    "pa",
    "ri",
    "so",
    "ta",
    "ve",
    "wo",
    "st",
    "er",
)


def draw_photo(seed: int, number: int) -> bytes:
    """Photo `number` of the corpus `seed`, as a JPEG."""
    random = np.random.default_rng([seed, number])
    width, height = (int(side * random.uniform(0.92, 1.08)) for side in (500, 400))
    if number % 4 == 3:
        width, height = height, width
    detail = random.uniform(0.7, 1.3)
    canvas = np.full((height, width, 3), 128.0, dtype=np.float32)
    for cells, strength in _FIELDS:
        coarse = random.normal(0, strength * detail, (cells * height // width + 2, cells + 2, 3)).astype(np.float32)
        for channel in range(3):
            field = Image.fromarray(coarse[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            canvas[..., channel] += np.asarray(field)
    canvas += random.normal(0, 5 * detail, (height, width, 1))
    file = io.BytesIO()
    Image.fromarray(canvas.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def draw_corpus(folder: Path, num_photos: int, seed: int = 0) -> Path:
    """Write `num_photos` photos below `folder`, and beside them a tokenizer's processor; kept for the next time.

    Returns:
        The folder, which holds `images/NUMBER.jpg` and `processor/`.
    """
    folder = folder / f"photos-{seed}-{num_photos}"
    done = folder / "done"
    if not done.exists():
        images = folder / "images"
        images.mkdir(parents=True, exist_ok=True)
        with ProcessPoolExecutor(num_cores()) as pool:
            list(pool.map(partial(_write_photo, images, seed), range(num_photos), chunksize=16))
        _processor(seed).save_pretrained(folder / "processor")
        done.touch()
    return folder


def write_rows(folder: Path, num_rows: int, num_photos: int, seed: int = 0) -> Path:
    """The LLaVA rows of a corpus: row i is about photo i modulo `num_photos`, so that rows can outnumber photos."""
    words = _words(seed)
    path = folder / f"rows-{num_rows}-of-{num_photos}.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_rows):
            random = np.random.default_rng([seed, number, 1])
            image = f"images/{number % num_photos}.jpg"
            file.write(json.dumps({"id": str(number), "image": image, "conversations": _turns(random, words)}) + "\n")
    return path


def _write_photo(images: Path, seed: int, number: int) -> None:
    (images / f"{number}.jpg").write_bytes(draw_photo(seed, number))


def _turns(random: np.random.Generator, words: list[str]) -> list[dict[str, str]]:
    turns = []
    for turn in range(int(random.integers(1, 5))):
        question = _sentence(random, words, 10) + "?"
        turns.append({"from": "human", "value": question if turn else f"<image>\n{question}"})
        turns.append({"from": "gpt", "value": _sentence(random, words, int(random.integers(5, 50))) + "."})
    return turns


def _sentence(random: np.random.Generator, words: list[str], length: int) -> str:
    # Few words are frequent, as in a language: that is what a tokenizer's speed depends on.
    ranks = np.minimum(random.zipf(1.3, length), len(words)) - 1
    return " ".join(words[rank] for rank in ranks).capitalize()


def _words(seed: int) -> list[str]:
    random = np.random.default_rng([seed, 2])
    return ["".join(random.choice(_SYLLABLES, random.integers(1, 5))) for _ in range(_WORDS)]


def _processor(seed: int) -> FlashSlothProcessor:
    words = _words(seed)
    random = np.random.default_rng([seed, 3])
    texts = [f"{SYSTEM} USER: {_sentence(random, words, 40)}. ASSISTANT:" for _ in range(2000)]
    tokenizer = train_tokenizer(texts, _VOCABULARY)
    return FlashSlothProcessor(FlashSlothImageProcessor(), tokenizer, num_image_tokens=IMAGE_TOKENS)
