"""What is noted for the data receipt while a chunk is made: times, sizes of images, hashes of ids, an example."""

from __future__ import annotations

import base64
import io
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import blake2b
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from pipelines.shards.receipts import ChunkFacts, Example

STEPS = ("read", "decode", "tokenize", "encode", "write")
"""read: the corpus, and waiting for images; decode: with resizing and tiling; encode: the tower; write: the shard."""

FACT_COLUMNS = [
    ("image_side", pa.int32()),  # pixels of the longer side, as received
    ("thumbnail", pa.binary()),  # of a few rows
    *((f"{step}_seconds", pa.float32()) for step in STEPS[:-1]),
]
_THUMBNAIL_SIDE = 192  # pixels

Item = TypeVar("Item")


class Stopwatch:
    """Seconds per step, added up until they are taken."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def time(self, step: str) -> Iterator[None]:
        """Count what happens inside for `step`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[step] += time.perf_counter() - start

    def each(self, step: str, items: Iterable[Item]) -> Iterator[Item]:
        """`items`, with the time that each is waited for counted for `step`."""
        iterator = iter(items)
        while True:
            start = time.perf_counter()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self._seconds[step] += time.perf_counter() - start
            yield item

    def take(self) -> dict[str, float]:
        """The columns of what was counted since the last time."""
        taken = {f"{step}_seconds": seconds for step, seconds in self._seconds.items()}
        self._seconds.clear()
        return taken


def thumbnail(image: Image.Image) -> bytes:
    """A small JPEG of an RGB picture."""
    small = image.copy()
    small.thumbnail((_THUMBNAIL_SIDE, _THUMBNAIL_SIDE))
    file = io.BytesIO()
    small.save(file, "JPEG", quality=80)
    return file.getvalue()


def chunk_facts(samples: pa.Table, write_seconds: float) -> ChunkFacts:
    """The facts of a chunk with these `samples` (columns: WORK_SCHEMA)."""
    seconds = {step: pc.sum(samples[f"{step}_seconds"]).as_py() or 0.0 for step in STEPS[:-1]}
    sides = samples["image_side"].drop_null().to_pylist()
    shown = samples.filter(pc.and_(samples["thumbnail"].is_valid(), pc.invert(samples["reason"].is_valid())))
    shown = shown.select(["key", "messages", "input_ids", "thumbnail"])
    return ChunkFacts(
        ids=_hashes(own_id for own_id in samples["id"].to_pylist() if own_id),
        image_sides=dict(sorted(Counter(sides).items())),
        seconds={step: round(value, 6) for step, value in {**seconds, "write": write_seconds}.items()},
        examples=[
            Example(
                key=row["key"],
                messages=row["messages"],
                num_tokens=len(row["input_ids"]),
                thumbnail=base64.b64encode(row["thumbnail"]).decode("ascii"),
            )
            for row in shown.to_pylist()
        ],
    )


def id_hashes(facts: ChunkFacts) -> np.ndarray:
    """uint64[N] of the rows with an own id."""
    return np.frombuffer(base64.b64decode(facts.ids), dtype="<u8")


def _hashes(ids: Iterable[str]) -> str:
    digests = b"".join(blake2b(own_id.encode(), digest_size=8).digest() for own_id in ids)
    return base64.b64encode(digests).decode("ascii")
