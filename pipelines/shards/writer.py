"""Samples -> one shard: an Arrow IPC file in which every row is a record batch of its own.

One row per batch makes a row one contiguous range of the file: a memory map reads it without touching its neighbours,
and a ranged GET fetches it alone, to be checked against a checksum of its own. The price is about 1.8 kB a row, next
to an image of 100 kB or more.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from pipelines import storage
from pipelines.shards.manifest import ShardEntry
from pipelines.shards.schema import IGNORED_LABEL, SAMPLE_SCHEMA

SHARD_FOLDER = "shards"


def serialize(samples: pa.Table) -> tuple[pa.Buffer, list[int]]:
    """The bytes of a shard with the rows of `samples` (columns: SAMPLE_SCHEMA), the same for the same rows.

    Returns:
        The bytes, and where in them each row begins; behind the last row, where that ends.
    """
    if samples.schema != SAMPLE_SCHEMA:
        raise ValueError(f"samples have the columns {samples.schema}, a shard has {SAMPLE_SCHEMA}")
    sink = pa.BufferOutputStream()
    offsets: list[int] = []
    with pa.ipc.new_file(sink, SAMPLE_SCHEMA) as writer:
        for batch in samples.to_batches():
            for row in (batch.slice(number, 1) for number in range(batch.num_rows)):
                writer.write_batch(row)
                if not offsets:  # what stands before the first row is written together with it
                    offsets.append(sink.tell() - pa.ipc.get_record_batch_size(row))
                offsets.append(sink.tell())
    return sink.getvalue(), offsets


def write_shard(folder: str, samples: pa.Table) -> ShardEntry:
    """Write `samples` as one shard below `folder`, named by its content, and describe it.

    Writing the same rows again, after a crash or from a second driver, replaces the file by itself.
    """
    buffer, offsets = serialize(samples)
    data = memoryview(buffer)
    digest = storage.sha256(data)
    name = f"{SHARD_FOLDER}/{digest}.arrow"
    storage.write_bytes(storage.join(folder, name), data)
    return ShardEntry(
        name=name,
        rows=samples.num_rows,
        bytes=data.nbytes,
        sha256=digest,
        num_tokens=_lengths(samples["input_ids"]),
        num_loss_tokens=[int((labels != IGNORED_LABEL).sum()) for labels in _arrays(samples["labels"])],
        has_image=pc.or_(samples["image"].is_valid(), samples["image_key"].is_valid()).to_pylist(),
        num_turns=[int(ids.max(initial=0)) for ids in _arrays(samples["question_ids"])],
        row_offsets=offsets,
        row_checksums=[xxhash.xxh3_64_hexdigest(data[start:stop]) for start, stop in pairwise(offsets)],
    )


def _lengths(column: pa.ChunkedArray) -> list[int]:
    return pc.list_value_length(column).to_pylist()


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    return [row.values.to_numpy() for row in column]
