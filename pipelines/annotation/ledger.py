"""What an annotation has done so far: its plan, a receipt per finished chunk, and at last the manifest."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

from pydantic import BaseModel, ConfigDict

from pipelines import storage
from pipelines.annotation.parts import PartEntry, first_name
from pipelines.annotation.plan import AnnotationPlan
from pipelines.annotation.settings import PartFormat
from pipelines.preparation.receipt_book import PublishError, ReceiptBook
from pipelines.shards.manifest import MANIFEST_NAME, REMEDY, ManifestError
from pipelines.shards.receipts import AccountingError, ChunkReceipt
from pipelines.storage.faults import naming
from pipelines.stored_models import StoredModelError, parse_model


class PartReceipt(ChunkReceipt):
    """That the part of one chunk is written."""

    part: PartEntry

    @property
    def reasons(self) -> Counter[str]:
        """Reason -> rows without an answer."""
        return Counter(self.part.errors)

    @property
    def file(self) -> tuple[str, int]:
        """Its part."""
        return self.part.name, self.part.bytes

    @property
    def num_tokens(self) -> int:
        """Tokens of the answers."""
        return self.part.answer_tokens


class AnnotationManifest(BaseModel):
    """A finished annotation. It holds no times and no host names."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = 1
    plan: str
    """Hash of the plan that is carried out."""
    model: str
    format: PartFormat
    rows: int
    errors: dict[str, int]
    """Reason -> rows without an answer."""
    prompt_tokens: int
    answer_tokens: int
    parts: list[PartEntry]

    @classmethod
    def load(cls, folder: str) -> AnnotationManifest:
        """Read the manifest of the annotation in `folder`.

        Raises:
            ManifestError: there is none (the annotation has not finished), or it is another kind of manifest.
        """
        uri = storage.join(folder, MANIFEST_NAME)
        try:
            return parse_model(cls, uri, storage.read_bytes(uri), "the manifest of an annotation", REMEDY)
        except FileNotFoundError as error:
            raise ManifestError(
                f"{folder}: no {MANIFEST_NAME} here: this is no annotation, or it has not finished; run "
                "jobs/annotate.py with its recipe to finish it"
            ) from error
        except StoredModelError as error:
            raise ManifestError(str(error)) from error

    def to_json(self) -> bytes:
        """The bytes that are stored; equal manifests give equal bytes."""
        return self.model_dump_json().encode()


class AnnotationLedger(ReceiptBook[AnnotationPlan, PartReceipt]):
    """The progress of an annotation; see ReceiptBook."""

    bad = "without an answer"
    share_field = "max_error_share"

    def __init__(self, output: str, plan: AnnotationPlan, max_error_share: float) -> None:
        super().__init__(output, plan, PartReceipt, max_error_share)

    def bad_example(self) -> str:
        """A row without an answer, and why."""
        return str(next(receipt.part.example for receipt in self.ordered() if receipt.part.errors))

    def check_rows(self, receipt: PartReceipt) -> None:
        """See ReceiptBook; by their number: the writer of a part has compared their keys."""
        planned = self.plan.chunks[receipt.chunk].rows
        if receipt.part.rows != planned:
            raise AccountingError(f"{receipt.part.name}: {receipt.part.rows} rows for {planned} inputs")

    def put(self, receipt: PartReceipt) -> PartReceipt:
        """See ReceiptBook. Raises PublishError too: the part was lost, and answered anew, since another driver put its
        receipt."""
        kept = super().put(receipt)
        if kept.part.name == receipt.part.name and kept.part.sha256 != receipt.part.sha256:
            part, name = (storage.join(self.output, path) for path in (receipt.part.name, kept.name))
            raise PublishError(
                f"{part} changed under way: it has the sha256 {receipt.part.sha256}, by {name} {kept.part.sha256}; "
                "remove both and run the job again: their chunk alone is then done anew"
            )
        return kept

    def publish(self) -> AnnotationManifest:
        """Write the manifest, and then remove the parts that it does not name.

        Raises:
            PublishError: too many rows have no answer, a part is lost, or another manifest is there already.
            AccountingError: rows are lost or doubled.
        """
        self.check_share()
        self.check_complete()
        self.check_files()
        for receipt in self.ordered():
            if receipt.part.rows != receipt.planned:
                raise AccountingError(f"{receipt.part.name}: {receipt.part.rows} rows for {receipt.planned} inputs")
        terms, entries = self.plan.terms, [receipt.part for receipt in self.ordered()]
        manifest = AnnotationManifest(
            plan=self.plan_identity,
            model=terms.model,
            format=terms.format,
            rows=sum(entry.rows for entry in entries),
            errors=dict(sorted(self.reasons.items())),
            prompt_tokens=sum(entry.prompt_tokens for entry in entries),
            answer_tokens=sum(entry.answer_tokens for entry in entries),
            parts=entries,
        )
        self.put_manifest(manifest.to_json())
        remove_superseded(self.output, manifest)
        return manifest


def superseded(folder: str, manifest: AnnotationManifest) -> list[str]:
    """What lies in `folder` of other attempts at the chunks of `manifest` than those that it names."""
    named = {entry.name for entry in manifest.parts}
    first_names = {first_name(name) for name in named}
    places = sorted({name.rpartition("/")[0] for name in named})
    found = [f"{place}/{name}" for place in places for name in storage.list_names(storage.join(folder, place))]
    return [storage.join(folder, part) for part in found if first_name(part) in first_names and part not in named]


def remove_superseded(folder: str, manifest: AnnotationManifest) -> None:
    """Remove `superseded`: only once `manifest` is there, for until then it is open which attempts it will name."""
    for uri in superseded(folder, manifest):
        file_system, path = storage.filesystem(uri)
        with suppress(FileNotFoundError), naming(uri):  # another run may be quicker
            file_system.rm_file(path)
