"""Is a shard what the manifest says? Its size, its rows by their own checksums, all of it by its sha256."""

from __future__ import annotations

import pyarrow as pa
import xxhash

from pipelines import storage
from pipelines.shards.manifest import QuarantineEntry, ShardEntry

CHANGED = "the shard was changed or cut after it was written; restore it, or prepare the dataset again"


class ShardError(ValueError):
    """A shard is not what the manifest says; the message names it with what was expected and what is there."""


def check(entry: ShardEntry | QuarantineEntry, uri: str, data: bytes | pa.Buffer) -> None:
    """Raise ShardError unless `data`, found at `uri`, is what `entry` says was written."""
    check_size(entry, uri, len(data))
    digest = storage.sha256(memoryview(data))
    if digest != entry.sha256:
        raise ShardError(f"{uri}: expected sha256 {entry.sha256}, found {digest}: {CHANGED}")


def check_rows(entry: ShardEntry, uri: str, data: pa.Buffer) -> None:
    """As `check`, by the rows' own checksums where there are any: a tenth of the cost of hashing the file."""
    if entry.row_checksums is None:
        return check(entry, uri, data)
    for position in range(entry.rows):
        start, stop = (entry.row_offsets or [])[position : position + 2]
        if not is_intact(entry, position, data.slice(start, stop - start)):
            raise damage(entry, uri, position, data)


def is_intact(entry: ShardEntry, position: int, row: pa.Buffer | memoryview | bytes) -> bool:
    """Whether the bytes `row` are those of the shard's row `position`; its manifest has checksums of rows."""
    return xxhash.xxh3_64_hexdigest(row) == (entry.row_checksums or [])[position]


def damage(entry: ShardEntry, uri: str, position: int, data: bytes | pa.Buffer) -> ShardError:
    """What to say of a shard, all of it `data`, whose row `position` is not intact."""
    check(entry, uri, data)
    return ShardError(f"{uri}: row {position} is not what the manifest says, the whole shard is: {CHANGED}")


def check_size(entry: ShardEntry | QuarantineEntry, uri: str, size: int) -> None:
    """Raise ShardError unless `size` is the number of bytes that were written."""
    if size != entry.bytes:
        raise ShardError(f"{uri}: expected {entry.bytes} bytes, found {size}: {CHANGED}")


def missing(entry: ShardEntry, uri: str) -> ShardError:
    """What to say of a shard that is not there."""
    return ShardError(
        f"{uri}: expected {entry.bytes} bytes with sha256 {entry.sha256}, found no such file: "
        "restore it, or prepare the dataset again"
    )
