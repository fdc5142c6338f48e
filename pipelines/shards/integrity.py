"""Is a shard what the manifest says? Its size, its rows and what frames them by checksums, all of it by its sha256."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow as pa
import xxhash

from pipelines import storage
from pipelines.shards.manifest import MANIFEST_NAME, QuarantineEntry, ShardEntry

# In a finished folder there is nothing left to prepare, until the manifest and a chunk's receipt are gone.
REMEDY = (
    f"restore it, prepare into another output, or remove {MANIFEST_NAME} and its chunk's receipt (jobs/prepare.py "
    "verify names it) and prepare again: that chunk alone is then made anew"
)
CHANGED = f"the shard was changed or cut after it was written; {REMEDY}"
_TABLE_REMEDY = f"restore it, or remove {MANIFEST_NAME} and prepare again: it is then written anew"
_TABLE_CHANGED = f"the table of quarantined rows was changed or cut after it was written; {_TABLE_REMEDY}"


class ShardError(ValueError):
    """A shard is not what the manifest says; the message names it with what was expected and what is there."""


def check(entry: ShardEntry | QuarantineEntry, uri: str, data: bytes | pa.Buffer) -> None:
    """Raise ShardError unless `data`, found at `uri`, is what `entry` says was written."""
    digest = storage.sha256(memoryview(data))
    if (len(data), digest) != (entry.bytes, entry.sha256):
        raise _changed(entry, uri, len(data), digest)


def check_rows(entry: ShardEntry, uri: str, data: pa.Buffer) -> None:
    """As `check`, by the checksums of rows and frame where there are any: a tenth of the cost of hashing the file."""
    if entry.row_checksums is None or entry.row_offsets is None:
        return check(entry, uri, data)
    head, foot = frame(entry)
    if not is_framed(entry, data.slice(head.start, head.stop), data.slice(foot.start, foot.stop - foot.start)):
        raise damage(entry, uri, "its head or foot", data)
    for position in range(entry.rows):
        start, stop = entry.row_offsets[position : position + 2]
        if not is_intact(entry, position, data.slice(start, stop - start)):
            raise damage(entry, uri, f"row {position}", data)


def is_intact(entry: ShardEntry, position: int, row: pa.Buffer | memoryview | bytes) -> bool:
    """Whether the bytes `row` are those of the shard's row `position`; its manifest has checksums of rows."""
    return xxhash.xxh3_64_hexdigest(row) == (entry.row_checksums or [])[position]


def frame(entry: ShardEntry) -> tuple[range, range]:
    """Where the shard's head and foot lie, which are all of it that belongs to no row; its manifest has offsets."""
    offsets = entry.row_offsets or [entry.bytes]
    return range(offsets[0]), range(offsets[-1], entry.bytes)


def is_framed(entry: ShardEntry, head: pa.Buffer | memoryview, foot: pa.Buffer | memoryview) -> bool:
    """Whether the bytes `head` and `foot` are those of the shard; true where its manifest has no checksum of them."""
    return entry.frame_checksum in (None, frame_checksum(head, foot))


def frame_checksum(head: pa.Buffer | memoryview, foot: pa.Buffer | memoryview) -> str:
    """XXH3 (64 bits) of a shard's head and foot together."""
    digest = xxhash.xxh3_64(head)
    digest.update(foot)
    return digest.hexdigest()


def damage(entry: ShardEntry, uri: str, part: str, data: bytes | pa.Buffer) -> ShardError:
    """What to say of a shard, all of it `data`, of which `part` is not intact."""
    check(entry, uri, data)
    return ShardError(f"{uri}: {part} is not what the manifest says, the whole shard is: {CHANGED}")


def check_size(entry: ShardEntry, uri: str, path: Path) -> None:
    """Raise ShardError unless the file at `path`, a shard found at `uri`, has the size of what was written."""
    if (size := path.stat().st_size) != entry.bytes:
        with path.open("rb") as file:
            raise _changed(entry, uri, size, hashlib.file_digest(file, "sha256").hexdigest())


def missing(entry: ShardEntry | QuarantineEntry, uri: str) -> ShardError:
    """What to say of a shard, or of the table of quarantined rows, that is not there."""
    remedy = REMEDY if isinstance(entry, ShardEntry) else _TABLE_REMEDY
    return ShardError(f"{uri}: expected {entry.bytes} bytes with sha256 {entry.sha256}, found no such file: {remedy}")


def _changed(entry: ShardEntry | QuarantineEntry, uri: str, size: int, digest: str) -> ShardError:
    changed = CHANGED if isinstance(entry, ShardEntry) else _TABLE_CHANGED
    return ShardError(
        f"{uri}: expected {entry.bytes} bytes with sha256 {entry.sha256}, found {size} with {digest}: {changed}"
    )
