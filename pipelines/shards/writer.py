"""Samples -> one shard: an Arrow IPC file in which every row is a record batch of its own.

One row per batch makes a row one contiguous range of the file: a memory map reads it without touching its neighbours,
and a ranged GET would fetch it alone. The price is about 1.8 kB a row, next to an image of 100 kB or more.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import storage
from pipelines.shards.manifest import ShardEntry
from pipelines.shards.schema import IGNORED_LABEL, SAMPLE_SCHEMA

SHARD_FOLDER = "shards"


def serialize(samples: pa.Table) -> pa.Buffer:
    """The bytes of a shard with the rows of `samples` (columns: SAMPLE_SCHEMA), the same for the same rows."""
    if samples.schema != SAMPLE_SCHEMA:
        raise ValueError(f"samples have the columns {samples.schema}, a shard has {SAMPLE_SCHEMA}")
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, SAMPLE_SCHEMA) as writer:
        for batch in samples.to_batches():
            for row in range(batch.num_rows):
                writer.write_batch(batch.slice(row, 1))
    return sink.getvalue()


def write_shard(folder: str, samples: pa.Table) -> ShardEntry:
    """Write `samples` as one shard below `folder`, named by its content, and describe it.

    Writing the same rows again, after a crash or from a second driver, replaces the file by itself.
    """
    data = memoryview(serialize(samples))
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
    )


def _lengths(column: pa.ChunkedArray) -> list[int]:
    return pc.list_value_length(column).to_pylist()


def _arrays(column: pa.ChunkedArray) -> list[np.ndarray]:
    return [row.values.to_numpy() for row in column]
