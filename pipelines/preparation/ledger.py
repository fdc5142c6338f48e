"""What a preparation has done so far: its plan, a receipt per finished chunk, and at last the manifest."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.preparation.data_receipt import LastRun, gather, write_data_receipt
from pipelines.preparation.plan import Plan
from pipelines.preparation.receipt_book import ReceiptBook
from pipelines.shards.images import ImageStore
from pipelines.shards.manifest import Manifest, QuarantineEntry
from pipelines.shards.receipts import AccountingError, QuarantinedRow, Receipt, keys_digest
from pipelines.shards.schema import QUARANTINE_SCHEMA, SAMPLE_SCHEMA, describe

QUARANTINE_NAME = "quarantine.parquet"


class Ledger(ReceiptBook[Plan, Receipt]):
    """The progress of a preparation; see ReceiptBook."""

    bad = "quarantined"
    share_field = "max_quarantined_share"

    def __init__(self, output: str, plan: Plan, max_quarantined_share: float) -> None:
        super().__init__(output, plan, Receipt, max_quarantined_share)

    def check_rows(self, receipt: Receipt) -> None:
        """See ReceiptBook; by their keys."""
        chunk = self.plan.chunks[receipt.chunk]
        if receipt.keys != keys_digest(self.plan.keys(chunk)):
            raise AccountingError(
                f"chunk {receipt.chunk}: {chunk.rows} rows planned from row {chunk.first_row} on, "
                f"{receipt.written} written and {len(receipt.quarantined)} quarantined, whose keys are others"
            )

    def bad_example(self) -> str:
        """The first quarantined row, where it lies and why."""
        row = next(self._quarantined())
        return f"{row.location}: {row.reason}: {row.detail}"

    def publish(self, run: LastRun | None = None) -> Manifest:
        """Write the table of quarantined rows, the data receipt and then, last of all, the manifest.

        Args:
            run: what the run that publishes has done, for the data receipt.

        Raises:
            PublishError: too many rows are quarantined, a shard is lost, or another manifest is there already.
            AccountingError: rows are lost or doubled.
        """
        self.check_share()
        self._account()
        self.check_files()
        manifest = manifest_of(self.plan, list(self.ordered()), _write_quarantine(self.output, self._quarantined()))
        shared = ImageStore(self.output).total() if self.plan.terms.share_images else (0, 0)
        told = gather(self.plan, list(self.ordered()), manifest, run, shared)
        write_data_receipt(self.output, told)
        self.put_manifest(manifest.to_json())
        for source in told.sources:
            if not source.written:  # beside larger ones it is no great share of all
                print(f"warning: source '{source.name}': all {source.planned:,} rows are quarantined", flush=True)
        return manifest

    def _quarantined(self) -> Iterator[QuarantinedRow]:
        return (row for receipt in self.ordered() for row in receipt.quarantined)

    def _account(self) -> None:
        """Every row of every chunk is accounted for. That its keys are the planned ones `put` has checked."""
        self.check_complete()
        for number, receipt in self.receipts.items():
            if receipt.planned != receipt.written + len(receipt.quarantined):
                raise AccountingError(
                    f"chunk {number}: {receipt.planned} rows planned, {receipt.written} written, "
                    f"{len(receipt.quarantined)} quarantined"
                )


def manifest_of(plan: Plan, receipts: Sequence[Receipt], quarantine: QuarantineEntry) -> Manifest:
    """What `plan` has come to: `receipts` of all its chunks, in order, and the table of quarantined rows."""
    terms = plan.terms
    reasons = Counter(row.reason for receipt in receipts for row in receipt.quarantined)
    return Manifest(
        plan=plan.identity(),
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
        planned=plan.num_rows,
        written=sum(receipt.written for receipt in receipts),
        quarantined=reasons.total(),
        quarantine_reasons=dict(sorted(reasons.items())),
        quarantine=quarantine,
        shards=[receipt.shard for receipt in receipts if receipt.shard],
    )


def _write_quarantine(output: str, rows: Iterable[QuarantinedRow]) -> QuarantineEntry:
    table = pa.Table.from_pylist([row.model_dump() for row in rows], schema=QUARANTINE_SCHEMA)
    sink = io.BytesIO()
    pq.write_table(table, sink)
    data = sink.getvalue()
    storage.write_bytes(storage.join(output, QUARANTINE_NAME), data)
    return QuarantineEntry(name=QUARANTINE_NAME, rows=table.num_rows, bytes=len(data), sha256=storage.sha256(data))
