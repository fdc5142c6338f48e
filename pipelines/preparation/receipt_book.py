"""The receipts of a plan in a folder, one per finished chunk: what makes a run that is killed go on where it was.

Every write is put-if-absent, so of two drivers on one folder none undoes the other's work: the second takes the first's
receipt for its own, and both arrive at one manifest. That holds for a chunk whose file is lost too: its receipt stays,
and the receipt of the next attempt is put beside it. A book lives on the driver and needs no Ray.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import ClassVar, Generic, TypeVar

from pipelines import storage
from pipelines.preparation.plan import PLAN_NAME, CorpusPlan
from pipelines.preparation.sources import PlanError
from pipelines.shards.manifest import MANIFEST_NAME
from pipelines.shards.receipts import AccountingError, ReceiptKind, load_receipt, load_receipts

PlanKind = TypeVar("PlanKind", bound=CorpusPlan)


class PublishError(ValueError):
    """The work is done or under way, but nothing may be published; the message says why and what helps."""


class ReceiptBook(ABC, Generic[PlanKind, ReceiptKind]):
    """The progress of `plan` in the folder `output`. Reads the receipts that are there.

    Its totals are kept as receipts come: to count them anew for each of a million chunks would take days.

    Args:
        output: a local path or any URI of fsspec.
        plan: written into the folder if it is empty.
        kind: what a receipt says.
        max_bad_share: with a larger share of rows of which nothing comes, nothing is published.

    Attributes:
        num_done: rows accounted for so far.
        reasons: reason -> rows of which nothing came so far.
        num_tokens: generated so far.
        lost: chunks with a receipt that are to be done anew -> what is wrong with the file that the receipt names.

    Raises:
        PlanError: the folder belongs to another plan.
        StoredModelError: its plan or a receipt is damaged.
        StorageError: the store does not honour conditional writes.
    """

    bad: ClassVar[str]
    """What rows are of which nothing came: quarantined, ..."""
    share_field: ClassVar[str]
    """The setting that bounds their share."""

    def __init__(self, output: str, plan: PlanKind, kind: type[ReceiptKind], max_bad_share: float) -> None:
        self.output = output
        self.plan = plan
        self.plan_identity = plan.identity()
        self.max_bad_share = max_bad_share
        self.receipts: dict[int, ReceiptKind] = {}
        self.num_done = 0
        self.num_tokens = 0
        self.reasons: Counter[str] = Counter()
        self._kind = kind
        self._open_plan()
        receipts = list(load_receipts(kind, output))
        self.lost = self._faults_of([receipt for receipt in receipts if receipt.plan == self.plan_identity])
        self._lost_receipts = {receipt.chunk: receipt for receipt in receipts if receipt.chunk in self.lost}
        for receipt in receipts:
            if receipt.chunk not in self.lost:
                self.enter(receipt)

    @property
    def pending(self) -> list[int]:
        """Numbers of the chunks without a receipt."""
        return [number for number in range(len(self.plan.chunks)) if number not in self.receipts]

    def attempt(self, chunk: int) -> int:
        """The attempt as which a chunk that is pending is done: a later one than that whose file is lost."""
        return self._lost_receipts[chunk].attempt + 1 if chunk in self.lost else 0

    @property
    def num_bad(self) -> int:
        """Rows so far of which nothing came."""
        return self.reasons.total()

    @abstractmethod
    def bad_example(self) -> str:
        """One of these rows and what is wrong with it; there is one."""

    def commit(self, receipt: ReceiptKind) -> None:
        """Put `receipt` and enter what lies there now.

        Raises: as `put`.
        """
        self.enter(self.put(receipt))

    def put(self, receipt: ReceiptKind) -> ReceiptKind:
        """Put `receipt` as that of the chunk's attempt; the one that lies there now, which another driver may have put.

        The receipt of a lost file counts again where the file, named by its content, is written again. The book itself
        is as before, so threads may put at once.

        Raises:
            AccountingError: its rows are not those that were planned, each once. It is not put then.
            StoredModelError: what lies there is damaged.
            OSError, StorageError: as `storage.put_if_absent`.
        """
        self.check_rows(receipt)
        lost = self._lost_receipts.get(receipt.chunk)
        if lost and lost.file == receipt.file:
            return lost
        receipt = receipt.model_copy(update={"attempt": self.attempt(receipt.chunk)})
        uri = storage.join(self.output, receipt.name)
        if storage.put_if_absent(uri, receipt.model_dump_json().encode()):
            return receipt
        return load_receipt(self._kind, uri)

    def enter(self, receipt: ReceiptKind) -> None:
        """Take a receipt that is put into the book. Raises PlanError where it is of another plan."""
        if receipt.plan != self.plan_identity:
            raise PlanError(
                f"{storage.join(self.output, receipt.name)}: a receipt of plan {receipt.plan[:12]}, this is plan "
                f"{self.plan_identity[:12]}; use another output"
            )
        if receipt.chunk in self.receipts:  # the store keeps the first, and so does the book
            return
        self.receipts[receipt.chunk] = receipt
        self.num_done += receipt.planned
        self.num_tokens += receipt.num_tokens
        self.reasons += receipt.reasons

    @abstractmethod
    def check_rows(self, receipt: ReceiptKind) -> None:
        """Raise AccountingError unless the rows of `receipt` are those that were planned, each once."""

    def ordered(self) -> Iterator[ReceiptKind]:
        """The receipts so far, in the order of their chunks."""
        return (self.receipts[number] for number in sorted(self.receipts))

    def check_share(self) -> None:
        """Raise PublishError as soon as more rows are bad than the whole work may lose."""
        planned = self.plan.num_rows
        if self.num_bad <= self.max_bad_share * planned and self.num_bad < planned:
            return
        listed = ", ".join(f"{reason} {count}" for reason, count in self.reasons.most_common())
        told = f"{self.output}: {self.num_bad} of {planned} rows are {self.bad} ({listed})"
        if self.num_bad >= planned:
            raise PublishError(
                f"{told}, so no row is left to publish, at any {self.share_field}; for example {self.bad_example()}. "
                "Look at what all rows share, such as their source's format and image_root, and write into another "
                "output"
            )
        raise PublishError(
            f"{told}, more than {self.share_field} {self.max_bad_share:g} allows; for example {self.bad_example()}. "
            "Nothing is published. Raise the share, or mend the corpus and write into another output"
        )

    def check_complete(self) -> None:
        """Raise AccountingError unless every chunk has a receipt for exactly as many rows as were planned, and no row
        was planned twice."""
        if self.pending:
            raise AccountingError(f"{len(self.pending)} of {len(self.plan.chunks)} chunks have no receipt")
        for number, receipt in self.receipts.items():
            if receipt.planned != self.plan.chunks[number].rows:
                raise AccountingError(
                    f"chunk {number}: {self.plan.chunks[number].rows} rows planned, the receipt is for "
                    f"{receipt.planned}"
                )

        free: dict[tuple[int, int], int] = {}  # the first row of a source that no chunk before has
        for number, chunk in enumerate(self.plan.chunks):
            first = free.get((chunk.source, chunk.repeat), 0)
            if chunk.first_row < first:
                raise AccountingError(f"chunk {number} begins at row {chunk.first_row}, one before it ends at {first}")
            free[chunk.source, chunk.repeat] = chunk.first_row + chunk.rows

    def check_files(self) -> None:
        """Raise PublishError unless the file of every receipt is there, with all its bytes: `verify` hashes them."""
        for chunk, fault in self._faults_of(list(self.receipts.values())).items():
            raise PublishError(
                f"{fault}; nothing is published. Restore it, or run the job again: chunk {chunk} is then done anew"
            )

    def put_manifest(self, data: bytes) -> None:
        """Publish: the last write of all.

        Raises:
            PublishError: another manifest is there already.
        """
        uri = storage.join(self.output, MANIFEST_NAME)
        if not storage.put_if_absent(uri, data):
            raise PublishError(f"{uri}: a different manifest is there already; use another output")

    def _faults_of(self, receipts: Sequence[ReceiptKind]) -> dict[int, str]:
        """Chunk -> what is wrong, for the files that are not as `receipts` say."""
        files = [(receipt.chunk, *receipt.file) for receipt in receipts if receipt.file]
        folders = {name.rpartition("/")[0] for _, name, _ in files}
        sizes = {folder: storage.list_sizes(storage.join(self.output, folder)) for folder in sorted(folders)}
        faults = {}
        for chunk, path, expected in files:
            folder, _, name = path.rpartition("/")
            found = sizes[folder].get(name)
            if found != expected:
                told = "found no such file" if found is None else f"found {found:,}"
                faults[chunk] = f"{storage.join(self.output, path)}: expected {expected:,} bytes, {told}"
        return faults

    def _open_plan(self) -> None:
        uri = storage.join(self.output, PLAN_NAME)
        if storage.put_if_absent(uri, self.plan.to_json()):
            storage.require_conditional_writes(uri)
            return
        theirs = type(self.plan).load(self.output)
        if theirs is None or theirs.identity() != self.plan_identity:
            raise PlanError(f"{uri}: another driver has just begun another plan here; use another output")
