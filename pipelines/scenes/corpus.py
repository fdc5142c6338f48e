"""Draw a whole corpus in LLaVA's format: a folder of pictures, and json files of conversations about them.

    corpus/
      images/train-00000.jpg ... heldout-00000.jpg ...
      captions.json    training pictures, one caption each (as LLaVA-Pretrain: for alignment)
      instruct.json    training pictures, a few questions each (as LLaVA-Instruct)
      heldout.json     questions about scenes that no training picture shows
      corpus.json      what was asked for; written last, so its presence means that the corpus is complete

Everything follows from the seed: every picture has its own random stream, so neither order nor threads matter.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flashsloth.conversation import SYSTEM
from pipelines.scenes.drawing import draw_scene
from pipelines.scenes.questions import CAPTION_REQUESTS, ask, caption
from pipelines.scenes.scene import Scene, invent_scene

# Raise when the same seed gives other pictures or questions than before: an older corpus is then drawn anew.
VERSION = 5
_SPLITS = ("train", "heldout")


@dataclass(frozen=True)
class DrawnCorpus:
    """Where the parts of a corpus lie, and how large it is."""

    folder: Path
    train_scenes: int
    heldout_scenes: int
    drawn: bool
    """False where the folder already held this very corpus."""

    @property
    def images(self) -> Path:
        """The folder that the rows' `image` fields are relative to."""
        return self.folder / "images"

    @property
    def captions(self) -> Path:
        """One caption per training picture."""
        return self.folder / "captions.json"

    @property
    def instruct(self) -> Path:
        """Questions about the training pictures."""
        return self.folder / "instruct.json"

    @property
    def heldout(self) -> Path:
        """Questions about held-out pictures."""
        return self.folder / "heldout.json"


def draw_corpus(folder: str | Path, train_scenes: int, heldout_scenes: int, seed: int) -> DrawnCorpus:
    """Write the corpus into `folder`, unless the same corpus is there already.

    Raises:
        ValueError: where a split would have no scene.
    """
    if train_scenes < 1 or heldout_scenes < 1:
        raise ValueError(
            "a corpus needs at least one scene in each split, "
            f"got {train_scenes} for training and {heldout_scenes} held out"
        )
    folder = Path(folder)
    wanted = {"version": VERSION, "train_scenes": train_scenes, "heldout_scenes": heldout_scenes, "seed": seed}
    receipt = folder / "corpus.json"
    complete = receipt.exists() and json.loads(receipt.read_text("utf-8")) == wanted
    corpus = DrawnCorpus(folder, train_scenes, heldout_scenes, drawn=not complete)
    if complete:
        return corpus
    receipt.unlink(missing_ok=True)
    corpus.images.mkdir(parents=True, exist_ok=True)
    train = _draw_split(corpus, "train", train_scenes, seed)
    heldout = _draw_split(corpus, "heldout", heldout_scenes, seed)
    _write_rows(corpus.captions, [row for row, _ in train])
    _write_rows(corpus.instruct, [row for _, row in train])
    _write_rows(corpus.heldout, [row for _, row in heldout])
    receipt.write_text(json.dumps(wanted), "utf-8")
    return corpus


def scene_of(seed: int, split: str, index: int) -> Scene:
    """The scene of one picture, as `draw_corpus` draws it: "train-00012.jpg" shows `scene_of(seed, "train", 12)`."""
    return invent_scene(_stream(seed, split, index, "scene"), heldout=split == "heldout")


def corpus_texts(corpus: DrawnCorpus) -> Iterator[str]:
    """What to train a tokenizer on: the training files' texts and the template's words, as sequences hold them.

    A sequence holds a question or an answer after a space, the first question and a caption without one.
    """
    for path in (corpus.captions, corpus.instruct):
        for row in json.loads(path.read_text("utf-8")):
            yield f"{SYSTEM} USER: ASSISTANT:"
            for message in row["conversations"]:
                text = message["value"].removeprefix("<image>\n")
                yield from (text, f" {text}")


def _stream(seed: int, split: str, index: int, purpose: str) -> np.random.Generator:
    return np.random.default_rng([seed, _SPLITS.index(split), index, len(purpose), *purpose.encode()])


def _draw_split(corpus: DrawnCorpus, split: str, num_scenes: int, seed: int) -> list[tuple[dict, dict]]:
    def draw(index: int) -> tuple[dict, dict]:
        scene = scene_of(seed, split, index)
        name = f"{split}-{index:05d}"
        picture = draw_scene(scene, _stream(seed, split, index, "picture"))
        picture.save(corpus.images / f"{name}.jpg", quality=92, subsampling=0)
        return _rows(scene, name, _stream(seed, split, index, "words"))

    # NumPy and the JPEG encoder release the interpreter lock for most of the work.
    with ThreadPoolExecutor() as pool:
        return list(pool.map(draw, range(num_scenes)))


def _rows(scene: Scene, name: str, rng: np.random.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    """The caption row and the question row of one picture."""
    picture = {"id": name, "image": f"{name}.jpg"}
    request = str(rng.choice(CAPTION_REQUESTS))
    turns = ask(scene, rng)
    questions = [message for turn in turns for message in (_says("human", turn.question), _says("gpt", turn.answer))]
    questions[0] = _says("human", f"<image>\n{turns[0].question}")
    return (
        {**picture, "conversations": [_says("human", f"<image>\n{request}"), _says("gpt", caption(scene))]},
        {**picture, "conversations": questions, "question_types": [turn.question_type for turn in turns]},
    )


def _says(who: str, text: str) -> dict[str, str]:
    return {"from": who, "value": text}


def _write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=1), "utf-8")
