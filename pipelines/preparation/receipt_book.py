"""The receipts of a plan in a folder, one per finished chunk: what makes a run that is killed go on where it was.

Every write is put-if-absent, so of two drivers on one folder none undoes the other's work: the second takes the first's
receipt for its own, and both arrive at one manifest. A book lives on the driver and needs no Ray.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Generic, TypeVar

from pipelines import storage
from pipelines.preparation.plan import PLAN_NAME, CorpusPlan
from pipelines.preparation.sources import PlanError
from pipelines.shards.manifest import MANIFEST_NAME
from pipelines.shards.receipts import RECEIPT_FOLDER, AccountingError, ChunkReceipt

PlanKind = TypeVar("PlanKind", bound=CorpusPlan)
ReceiptKind = TypeVar("ReceiptKind", bound=ChunkReceipt)


class PublishError(ValueError):
    """The work is done or under way, but nothing may be published; the message says why and what helps."""


class ReceiptBook(Generic[PlanKind, ReceiptKind]):
    """The progress of `plan` in the folder `output`. Reads the receipts that are there.

    Args:
        output: a local path or any URI of fsspec.
        plan: written into the folder if it is empty.
        kind: what a receipt says.

    Raises:
        PlanError: the folder belongs to another plan.
        StorageError: the store does not honour conditional writes.
    """

    def __init__(self, output: str, plan: PlanKind, kind: type[ReceiptKind]) -> None:
        self.output = output
        self.plan = plan
        self.plan_identity = plan.identity()
        self.receipts: dict[int, ReceiptKind] = {}
        self._kind = kind
        self._open_plan()
        names = [name for name in storage.list_names(storage.join(output, RECEIPT_FOLDER)) if name.endswith(".json")]
        uris = [storage.join(output, RECEIPT_FOLDER, name) for name in names]
        for receipt in map(kind.model_validate_json, storage.read_many(uris)):
            self._enter(receipt)

    @property
    def pending(self) -> list[int]:
        """Numbers of the chunks without a receipt."""
        return [number for number in range(len(self.plan.chunks)) if number not in self.receipts]

    @property
    def num_done(self) -> int:
        """Rows accounted for so far."""
        return sum(receipt.planned for receipt in self.receipts.values())

    def commit(self, receipt: ReceiptKind) -> None:
        """Put `receipt` if its chunk has none; else keep the one that another driver has put."""
        uri = storage.join(self.output, receipt.name)
        if not storage.put_if_absent(uri, receipt.model_dump_json().encode()):
            receipt = self._kind.model_validate_json(storage.read_bytes(uri))
        self._enter(receipt)

    def ordered(self) -> Iterator[ReceiptKind]:
        """The receipts so far, in the order of their chunks."""
        return (self.receipts[number] for number in sorted(self.receipts))

    def check_complete(self) -> None:
        """Raise AccountingError unless every chunk has a receipt for exactly as many rows as were planned."""
        if self.pending:
            raise AccountingError(f"{len(self.pending)} of {len(self.plan.chunks)} chunks have no receipt")
        for number, receipt in self.receipts.items():
            if receipt.planned != self.plan.chunks[number].rows:
                raise AccountingError(
                    f"chunk {number}: {self.plan.chunks[number].rows} rows planned, the receipt is for "
                    f"{receipt.planned}"
                )

    def put_manifest(self, data: bytes) -> None:
        """Publish: the last write of all.

        Raises:
            PublishError: another manifest is there already.
        """
        uri = storage.join(self.output, MANIFEST_NAME)
        if not storage.put_if_absent(uri, data):
            raise PublishError(f"{uri}: a different manifest is there already; use another output")

    def _open_plan(self) -> None:
        uri = storage.join(self.output, PLAN_NAME)
        if storage.put_if_absent(uri, self.plan.to_json()):
            storage.require_conditional_writes(uri)
            return
        theirs = type(self.plan).model_validate_json(storage.read_bytes(uri))
        if theirs.identity() != self.plan_identity:
            raise PlanError(f"{uri}: another driver has just begun another plan here; use another output")

    def _enter(self, receipt: ReceiptKind) -> None:
        if receipt.plan != self.plan_identity:
            raise PlanError(
                f"{storage.join(self.output, receipt.name)}: a receipt of plan {receipt.plan[:12]}, this is plan "
                f"{self.plan_identity[:12]}; use another output"
            )
        self.receipts[receipt.chunk] = receipt
