"""A receipt says that one chunk of a plan is done: its shard is written, and every row is accounted for.

Receipts are put only if absent, one per chunk, after the shard that they name is complete. What has no receipt has not
happened, so a preparation that was killed at any instant goes on where its receipts end.

No receipt is ever replaced. Where the file that one names is lost, the chunk is done anew as its next attempt, whose
receipt has a name of its own. The latest attempt counts.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from typing import TypeVar

import xxhash
from pydantic import BaseModel, ConfigDict, Field

from pipelines import storage
from pipelines.shards.manifest import MANIFEST_NAME, ShardEntry
from pipelines.stored_models import StoredModelError, load_model, parse_model

RECEIPT_FOLDER = "receipts"
_WHAT = "a receipt"
_ANEW = f"{MANIFEST_NAME} where there is one, and run the job again: its chunk alone is then done anew"
_REMEDY = f"remove it, and {_ANEW}"


class AccountingError(RuntimeError):
    """Rows were lost or doubled: a fault of this program, never of the data."""


class QuarantinedRow(BaseModel):
    """A row that could not become a sample, and why."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    id: str
    source: str
    location: str
    reason: str
    detail: str


class Example(BaseModel):
    """A row to look at."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    key: str
    messages: list[dict[str, str]]
    num_tokens: int
    thumbnail: str
    """A small JPEG in base64."""


class ChunkFacts(BaseModel):
    """What the data receipt tells of a chunk. Its times differ from run to run, the dataset does not."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ids: str = ""
    """uint64 of each row that has an own id, little-endian in base64: a hash of the id, to count repeats by."""
    image_sides: dict[int, int] = {}
    """Longer side in pixels, as received -> images that were decoded: those of a shared image once."""
    seconds: dict[str, float] = {}
    """Step -> seconds of one worker."""
    examples: list[Example] = []


class ChunkReceipt(BaseModel, ABC):
    """That one chunk of a plan is done. What of it, a subclass says."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    plan: str
    """Identity of the plan: a receipt of another plan in the same folder is an error."""
    chunk: int
    planned: int
    """Rows of the chunk."""
    attempt: int = Field(default=0, exclude_if=lambda attempt: attempt == 0)
    """How many receipts the chunk had before, whose files were lost."""

    @property
    def name(self) -> str:
        """Path of the receipt below the dataset's folder."""
        return receipt_name(self.chunk, self.attempt)

    @property
    @abstractmethod
    def reasons(self) -> Counter[str]:
        """Reason -> rows of which nothing came."""

    @property
    @abstractmethod
    def file(self) -> tuple[str, int] | None:
        """What is written, as its path below the folder and its bytes; None where nothing is."""

    @property
    def num_tokens(self) -> int:
        """Tokens that were generated; 0 where the work generates none."""
        return 0


class Receipt(ChunkReceipt):
    """What became of the rows of one chunk in preparation."""

    keys: str
    """`keys_digest` of its rows, written and quarantined: the driver compares it with the keys of its plan."""
    shard: ShardEntry | None
    """None where every row of the chunk is quarantined."""
    quarantined: list[QuarantinedRow]
    facts: ChunkFacts = ChunkFacts()

    @property
    def written(self) -> int:
        """Rows in the shard."""
        return self.shard.rows if self.shard else 0

    @property
    def reasons(self) -> Counter[str]:
        """Reason -> quarantined rows."""
        return Counter(row.reason for row in self.quarantined)

    @property
    def file(self) -> tuple[str, int] | None:
        """Its shard."""
        return (self.shard.name, self.shard.bytes) if self.shard else None


ReceiptKind = TypeVar("ReceiptKind", bound=ChunkReceipt)


def load_receipt(kind: type[ReceiptKind], uri: str) -> ReceiptKind:
    """The receipt at `uri`.

    Raises:
        StoredModelError: it is missing, damaged, or of another kind.
        OSError, StorageError: as `storage.read_bytes`.
    """
    try:
        return load_model(kind, uri, _WHAT, _REMEDY)
    except FileNotFoundError as error:
        raise StoredModelError(
            f"{uri}: expected the receipt of a chunk, found no such file; restore it, or remove {_ANEW}"
        ) from error


def load_receipts(kind: type[ReceiptKind], folder: str) -> Iterator[ReceiptKind]:
    """The latest receipts of the dataset in `folder`, many read at a time. Raises: as `load_receipt`."""
    uris = [storage.join(folder, RECEIPT_FOLDER, name) for name in _latest(folder).values()]
    for uri, data in zip(uris, storage.read_many(uris), strict=True):
        yield parse_model(kind, uri, data, _WHAT, _REMEDY)


def receipt_uris(folder: str, num_chunks: int) -> list[str]:
    """Where the latest receipt of each chunk of the dataset in `folder` lies, or should lie."""
    latest = _latest(folder)
    names = map(attempt_name, range(num_chunks))
    return [storage.join(folder, RECEIPT_FOLDER, latest.get(name, f"{name}.json")) for name in names]


def describe_done(folder: str, num_chunks: int) -> str:
    """How far an output is that an earlier run has begun, in a line."""
    return f"{len(_latest(folder)):,} of {num_chunks:,} chunks are done already"


def _latest(folder: str) -> dict[str, str]:
    """Chunk, as in a file's name -> the file of its latest receipt."""
    found = [name for name in storage.list_names(storage.join(folder, RECEIPT_FOLDER)) if name.endswith(".json")]
    latest: dict[str, tuple[int, str]] = {}
    for name in found:
        chunk, _, attempt = name.removesuffix(".json").partition("-")
        each = int(attempt) if attempt.isdecimal() else 0, name
        latest[chunk] = max(latest.get(chunk, each), each)
    return {chunk: name for chunk, (_, name) in sorted(latest.items())}


def attempt_name(chunk: int, attempt: int = 0) -> str:
    """Of a chunk's file, the name without its ending. Attempts lie in the order of their chunks."""
    return f"{chunk:08d}-{attempt}" if attempt else f"{chunk:08d}"


def receipt_name(chunk: int, attempt: int = 0) -> str:
    """Path of a receipt of `chunk` below the dataset's folder."""
    return f"{RECEIPT_FOLDER}/{attempt_name(chunk, attempt)}.json"


def keys_digest(keys: Iterable[str]) -> str:
    """What tells one set of keys from another, and a key that is there twice: in whatever order, 128 bits."""
    return xxhash.xxh3_128_hexdigest("\n".join(sorted(keys)).encode())


def account(planned: Collection[str], written: Collection[str], quarantined: Collection[str]) -> None:
    """Check that planned = written + quarantined, every key once.

    Raises:
        AccountingError: with the numbers and the first keys that are lost, doubled or not planned.
    """
    seen = [*written, *quarantined]
    faults = {
        "lost": set(planned) - set(seen),
        "not planned": set(seen) - set(planned),
        "doubled": {key for key in seen if seen.count(key) > 1} if len(set(seen)) < len(seen) else set(),
    }
    if any(faults.values()):
        found = "; ".join(f"{name}: {', '.join(sorted(keys)[:3])}" for name, keys in faults.items() if keys)
        raise AccountingError(
            f"{len(planned)} rows planned, {len(written)} written, {len(quarantined)} quarantined; {found}"
        )
