"""What a preparation has done so far: its plan, a receipt per finished chunk, and at last the manifest.

Every write is put-if-absent, so of two drivers on one folder none undoes the other's work: the second takes the first's
receipt for its own, and both arrive at one manifest. The ledger lives on the driver and needs no Ray.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.preparation.data_receipt import LastRun, gather, write_data_receipt
from pipelines.preparation.plan import PLAN_NAME, Plan, PlanError, load_plan
from pipelines.shards.images import ImageStore
from pipelines.shards.manifest import MANIFEST_NAME, Manifest, QuarantineEntry
from pipelines.shards.receipts import RECEIPT_FOLDER, AccountingError, QuarantinedRow, Receipt
from pipelines.shards.schema import QUARANTINE_SCHEMA, SAMPLE_SCHEMA, describe

QUARANTINE_NAME = "quarantine.parquet"


class PublishError(ValueError):
    """The work is done or under way, but nothing may be published; the message says why and what helps."""


class Ledger:
    """The progress of `plan` in the folder `output`. Reads the receipts that are there.

    Raises:
        PlanError: the folder belongs to another plan.
        StorageError: the store does not honour conditional writes.
    """

    def __init__(self, output: str, plan: Plan, max_quarantined_share: float) -> None:
        self.output = output
        self.plan = plan
        self.plan_identity = plan.identity()
        self.max_quarantined_share = max_quarantined_share
        self.receipts: dict[int, Receipt] = {}
        self._open_plan()
        names = [name for name in storage.list_names(storage.join(output, RECEIPT_FOLDER)) if name.endswith(".json")]
        uris = [storage.join(output, RECEIPT_FOLDER, name) for name in names]
        for receipt in map(Receipt.model_validate_json, storage.read_many(uris)):
            self._enter(receipt)

    @property
    def pending(self) -> list[int]:
        """Numbers of the chunks without a receipt."""
        return [number for number in range(len(self.plan.chunks)) if number not in self.receipts]

    @property
    def num_quarantined(self) -> int:
        """Rows quarantined so far."""
        return sum(len(receipt.quarantined) for receipt in self.receipts.values())

    @property
    def num_done(self) -> int:
        """Rows accounted for so far, written or quarantined."""
        return sum(receipt.planned for receipt in self.receipts.values())

    def commit(self, receipt: Receipt) -> None:
        """Put `receipt` if its chunk has none; else keep the one that another driver has put."""
        uri = storage.join(self.output, receipt.name)
        if not storage.put_if_absent(uri, receipt.model_dump_json().encode()):
            receipt = Receipt.model_validate_json(storage.read_bytes(uri))
        self._enter(receipt)

    def check_share(self) -> None:
        """Raise PublishError as soon as more rows are quarantined than the whole preparation may lose."""
        bad, planned = self.num_quarantined, self.plan.num_rows
        if bad <= self.max_quarantined_share * planned and bad < planned:
            return
        reasons = ", ".join(f"{reason} {count}" for reason, count in self._reasons().most_common())
        example = next(self._quarantined())
        raise PublishError(
            f"{self.output}: {bad} of {planned} rows are quarantined ({reasons}), more than max_quarantined_share "
            f"{self.max_quarantined_share:g} allows; for example {example.location}: {example.reason}: "
            f"{example.detail}. Nothing is published. Raise the share, or mend the corpus and prepare it into "
            "another output"
        )

    def publish(self, run: LastRun | None = None) -> Manifest:
        """Write the table of quarantined rows, the data receipt and then, last of all, the manifest.

        Args:
            run: what the run that publishes has done, for the data receipt.

        Raises:
            PublishError: too many rows are quarantined, or another manifest is there already.
            AccountingError: rows are lost or doubled.
        """
        self.check_share()
        self._account()
        manifest = self._manifest()
        shared = ImageStore(self.output).total() if self.plan.terms.share_images else (0, 0)
        write_data_receipt(self.output, gather(self.plan, list(self._ordered()), manifest, run, shared))
        uri = storage.join(self.output, MANIFEST_NAME)
        if not storage.put_if_absent(uri, manifest.to_json()) and storage.read_bytes(uri) != manifest.to_json():
            raise PublishError(f"{uri}: a different manifest is there already; prepare into another output")
        return manifest

    def _open_plan(self) -> None:
        uri = storage.join(self.output, PLAN_NAME)
        if storage.put_if_absent(uri, self.plan.to_json()):
            storage.require_conditional_writes(uri)
            return
        theirs = load_plan(self.output)
        if theirs is None or theirs.identity() != self.plan_identity:
            raise PlanError(f"{uri}: another driver has just begun another plan here; prepare into another output")

    def _enter(self, receipt: Receipt) -> None:
        if receipt.plan != self.plan_identity:
            raise PlanError(
                f"{storage.join(self.output, receipt.name)}: a receipt of plan {receipt.plan[:12]}, this is plan "
                f"{self.plan_identity[:12]}; prepare into another output"
            )
        self.receipts[receipt.chunk] = receipt

    def _ordered(self) -> Iterator[Receipt]:
        return (self.receipts[number] for number in sorted(self.receipts))

    def _quarantined(self) -> Iterator[QuarantinedRow]:
        return (row for receipt in self._ordered() for row in receipt.quarantined)

    def _reasons(self) -> Counter[str]:
        return Counter(row.reason for row in self._quarantined())

    def _account(self) -> None:
        """Every chunk has a receipt for exactly its rows. That its keys are the planned ones its writer has checked."""
        if self.pending:
            raise AccountingError(f"{len(self.pending)} of {len(self.plan.chunks)} chunks have no receipt")
        for number, receipt in self.receipts.items():
            planned, bad = self.plan.chunks[number].rows, len(receipt.quarantined)
            if not planned == receipt.planned == receipt.written + bad:
                raise AccountingError(
                    f"chunk {number}: {planned} rows planned, {receipt.written} written, {bad} quarantined"
                )

    def _manifest(self) -> Manifest:
        terms, receipts = self.plan.terms, list(self._ordered())
        return Manifest(
            plan=self.plan_identity,
            payload=terms.payload,
            layout=terms.layout,
            max_length=terms.max_length,
            tiling=terms.tiling,
            num_image_tokens=terms.num_image_tokens,
            image_shape=terms.image_shape,
            image_dtype=terms.image_dtype,
            processor_identity=terms.processor_identity,
            encoder_identity=terms.encoder_identity,
            schema=describe(SAMPLE_SCHEMA),
            planned=self.plan.num_rows,
            written=sum(receipt.written for receipt in receipts),
            quarantined=self.num_quarantined,
            quarantine_reasons=dict(sorted(self._reasons().items())),
            quarantine=_write_quarantine(self.output, self._quarantined()),
            shards=[receipt.shard for receipt in receipts if receipt.shard],
        )


def _write_quarantine(output: str, rows: Iterable[QuarantinedRow]) -> QuarantineEntry:
    table = pa.Table.from_pylist([row.model_dump() for row in rows], schema=QUARANTINE_SCHEMA)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    data = sink.getvalue()
    storage.write_bytes(storage.join(output, QUARANTINE_NAME), data)
    return QuarantineEntry(name=QUARANTINE_NAME, rows=table.num_rows, bytes=len(data), sha256=storage.sha256(data))
