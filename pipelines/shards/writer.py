"""Samples -> one shard: an Arrow IPC file in which every row is a record batch of its own.

One row per batch makes a row one contiguous range of the file: a memory map reads it without touching its neighbours,
and a ranged GET fetches it alone, to be checked against a checksum of its own. The price is about 1.8 kB a row, next
to an image of 100 kB or more.

A shard is put together in memory that the process keeps for the next one: memory that is new to a process costs more
than all that is written into it. A row is hashed as soon as it is there, while the processor's cache still holds it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from threading import Lock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipelines import storage
from pipelines.shards.integrity import frame_checksum
from pipelines.shards.manifest import ShardEntry
from pipelines.shards.schema import IGNORED_LABEL, SAMPLE_SCHEMA

SHARD_FOLDER = "shards"
_ENDS = 2**16  # bytes, more than a shard has before its first row and, apart from the places of rows, behind its last
_PLACE = 64  # bytes, more than a shard's end says of each row
_PAGE = 4096  # bytes


@dataclass(frozen=True)
class _Shard:
    data: memoryview
    sha256: str
    row_offsets: list[int]
    row_checksums: list[str]
    frame_checksum: str


class _Bench:
    """Memory in which one shard after the other is put together. It begins at a page, as writing to a disk likes it."""

    def __init__(self) -> None:
        self.lock = Lock()
        self._memory = np.empty(0, np.uint8)

    def put_together(self, samples: pa.Table) -> _Shard:
        """The bytes of a shard with the rows of `samples`, the same for the same rows; they last until the next one."""
        rows = [batch.slice(number, 1) for batch in samples.to_batches() for number in range(batch.num_rows)]
        sizes = [pa.ipc.get_record_batch_size(row) for row in rows]
        data = self._room(sum(sizes) + _ENDS + _PLACE * len(rows))
        digest = hashlib.sha256()
        offsets: list[int] = []
        checksums: list[str] = []
        with pa.FixedSizeBufferWriter(pa.py_buffer(data)) as sink:
            done = 0
            with pa.ipc.new_file(sink, SAMPLE_SCHEMA) as writer:
                for row, size in zip(rows, sizes, strict=True):
                    writer.write_batch(row)
                    # What stands before the first row is written together with it.
                    start, end = sink.tell() - size, sink.tell()
                    digest.update(data[done:end])
                    checksums.append(xxhash.xxh3_64_hexdigest(data[start:end]))
                    offsets.append(start)
                    done = end
            offsets.append(done)
            data = data[: sink.tell()]
        digest.update(data[done:])
        return _Shard(data, digest.hexdigest(), offsets, checksums, frame_checksum(data[: offsets[0]], data[done:]))

    def _room(self, size: int) -> memoryview:
        if len(self._memory) < size:
            memory = np.empty(size + _PAGE, np.uint8)
            self._memory = memory[-memory.ctypes.data % _PAGE :]
        return self._memory.data


_BENCH = _Bench()


def write_shard(folder: str, samples: pa.Table) -> ShardEntry:
    """Write `samples` (columns: SAMPLE_SCHEMA, at least one row) as one shard below `folder`, named by its content.

    Writing the same rows again, after a crash or from a second driver, replaces the file by itself.
    """
    if samples.schema != SAMPLE_SCHEMA:
        raise ValueError(f"samples have the columns {samples.schema}, a shard has {SAMPLE_SCHEMA}")
    with _BENCH.lock:
        shard = _BENCH.put_together(samples)
        name = f"{SHARD_FOLDER}/{shard.sha256}.arrow"
        storage.write_bytes(storage.join(folder, name), shard.data, shard.sha256)
    return ShardEntry(
        name=name,
        rows=samples.num_rows,
        bytes=shard.data.nbytes,
        sha256=shard.sha256,
        num_tokens=_lengths(samples["input_ids"]),
        num_loss_tokens=[int((labels != IGNORED_LABEL).sum()) for labels in _arrays(samples["labels"])],
        has_image=pc.or_(samples["image"].is_valid(), samples["image_key"].is_valid()).to_pylist(),
        num_turns=[int(ids.max(initial=0)) for ids in _arrays(samples["question_ids"])],
        row_offsets=shard.row_offsets,
        row_checksums=shard.row_checksums,
        frame_checksum=shard.frame_checksum,
    )


def _lengths(column: pa.ChunkedArray) -> list[int]:
    return pc.list_value_length(column).to_pylist()


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    return [row.values.to_numpy() for row in column]
