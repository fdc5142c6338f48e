"""Made-up samples with lengths like those of LLaVA-1.5's 665k mix, as rows of numbers and as a prepared folder.

The mix is published source by source (arXiv 2310.03744, appendix); so are its number of rows and, for most sources, of
questions. How many tokens a question and an answer of a source have is our estimate, for the data itself is not at hand
where this runs: every figure that comes of it is about this distribution and no other. Turns are 1 + Poisson, lengths
log-normal around the mean with sigma 0.6, and a row ends at 3072 tokens, the published maximum.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from flashsloth import FlashSlothProcessor
from pipelines import storage
from pipelines.shards.manifest import MANIFEST_NAME, Manifest, QuarantineEntry
from pipelines.shards.schema import IGNORED_LABEL, SAMPLE_SCHEMA, describe
from pipelines.shards.writer import write_shard

MAX_LENGTH = 3072
_PREFIX = 32  # the system text, up to the image
_AROUND_TURN = 8  # "USER:", "ASSISTANT:" and the end of sequence
_SIGMA = 0.6
_ROWS_PER_SHARD = 64


@dataclass(frozen=True)
class Source:
    """A part of the mix."""

    name: str
    rows: int
    """In thousands."""
    turns: float
    question: float
    """Tokens, mean."""
    answer: float
    """Tokens, mean."""
    has_image: bool = True


MIX = (
    Source("LLaVA conversations", 58, 4.4, 12, 35),
    Source("LLaVA descriptions", 23, 1, 12, 110),
    Source("LLaVA reasoning", 77, 1, 20, 120),
    Source("ShareGPT", 40, 4, 60, 250, has_image=False),
    Source("VQAv2", 83, 5.4, 9, 2),
    Source("GQA", 72, 13, 10, 2),
    Source("OKVQA", 9, 1, 20, 2),
    Source("OCR-VQA", 80, 5, 9, 6),
    Source("A-OKVQA", 66, 1, 60, 2),
    Source("TextCaps", 22, 1, 70, 12),
    Source("RefCOCO", 48, 5, 20, 14),
    Source("Visual Genome", 86, 10, 18, 12),
)


@dataclass(frozen=True)
class Shape:
    """A row without its words: tokens of each question and of each answer."""

    has_image: bool
    questions: list[int]
    answers: list[int]

    def num_tokens(self, image_tokens: int, query_tokens: int) -> int:
        """Length of the row."""
        around = len(self.questions) * (_AROUND_TURN + query_tokens)
        return _PREFIX + self.has_image * image_tokens + around + sum(self.questions) + sum(self.answers)


def draw_shapes(count: int, seed: int, image_tokens: int = 81, query_tokens: int = 9) -> list[Shape]:
    """`count` rows of the mix, in a random order. The same for the same seed."""
    random = np.random.default_rng(seed)
    shares = np.array([source.rows for source in MIX], dtype=float)
    drawn = random.choice(len(MIX), count, p=shares / shares.sum())
    return [_shape(random, MIX[number], image_tokens, query_tokens) for number in drawn]


def _shape(random: np.random.Generator, source: Source, image_tokens: int, query_tokens: int) -> Shape:
    turns = 1 + int(random.poisson(source.turns - 1))
    questions, answers = (_lengths(random, mean, turns) for mean in (source.question, source.answer))
    whole = Shape(source.has_image, questions, answers)
    while len(whole.questions) > 1 and whole.num_tokens(image_tokens, query_tokens) > MAX_LENGTH:
        whole = Shape(source.has_image, whole.questions[:-1], whole.answers[:-1])
    over = whole.num_tokens(image_tokens, query_tokens) - MAX_LENGTH
    if over <= 0:
        return whole
    return Shape(source.has_image, whole.questions, [max(1, whole.answers[0] - over)])


def _lengths(random: np.random.Generator, mean: float, turns: int) -> list[int]:
    drawn = random.lognormal(np.log(mean) - _SIGMA**2 / 2, _SIGMA, turns)
    return np.maximum(1, drawn.round()).astype(int).tolist()


def sample_of(shape: Shape, processor: FlashSlothProcessor, random: np.random.Generator) -> dict[str, list[int]]:
    """`input_ids, labels, question_ids` of a row, its words drawn at random."""
    ids: list[int] = []
    labels: list[int] = []
    turns: list[int] = []

    def put(tokens: list[int], turn: int = 0, learned: bool = False) -> None:
        ids.extend(tokens)
        labels.extend(tokens if learned else [IGNORED_LABEL] * len(tokens))
        turns.extend([turn] * len(tokens))

    def words(count: int) -> list[int]:
        return random.integers(10, 200, count).tolist()

    put(words(_PREFIX))
    put([processor.image_token_id] * (processor.num_image_tokens * shape.has_image))
    for turn, (question, answer) in enumerate(zip(shape.questions, shape.answers, strict=True), start=1):
        put(words(_AROUND_TURN // 2))
        put(words(question), turn)
        put([processor.query_token_id] * processor.num_query_tokens, turn)
        put(words(_AROUND_TURN - _AROUND_TURN // 2 - 1))
        put([*words(answer), processor.eos_token_id], learned=True)
    return {"input_ids": ids, "labels": labels, "question_ids": turns}


def write_folder(folder: Path, shapes: list[Shape], processor: FlashSlothProcessor, seed: int) -> str:
    """Write `shapes` as a prepared folder with random pixels, unless it is there; returns it."""
    if (folder / MANIFEST_NAME).exists():
        return str(folder)
    random = np.random.default_rng([seed, 1])
    side = processor.image_processor.size
    shape = [processor.image_processor.num_tiles, 3, side, side]
    shards = []
    for start in range(0, len(shapes), _ROWS_PER_SHARD):
        rows = []
        for number, each in enumerate(shapes[start : start + _ROWS_PER_SHARD], start):
            row: dict[str, Any] = {
                "key": f"drawn:{number}",
                "id": str(number),
                "source": "drawn",
                "messages": [],
                "question_types": [],
            }
            row |= sample_of(each, processor, random)
            if each.has_image:
                row |= {"image": random.bytes(int(np.prod(shape))), "image_shape": shape, "image_dtype": "uint8"}
            rows.append(row)
        shards.append(write_shard(str(folder), pa.Table.from_pylist(rows, schema=SAMPLE_SCHEMA)))
    manifest = Manifest(
        plan="drawn",
        payload="pixels",
        layout="chat",
        max_length=MAX_LENGTH,
        tiling=processor.image_processor.tiling,
        num_image_tokens=processor.num_image_tokens,
        image_shape=shape,
        image_dtype="uint8",
        processor_identity=processor.identity(),
        encoder_identity=None,
        schema=describe(SAMPLE_SCHEMA),
        planned=len(shapes),
        written=len(shapes),
        quarantined=0,
        quarantine_reasons={},
        quarantine=QuarantineEntry(name="quarantine/none.parquet", rows=0, bytes=0, sha256="0" * 64),
        shards=shards,
    )
    storage.write_bytes(str(folder / MANIFEST_NAME), manifest.to_json())
    return str(folder)
