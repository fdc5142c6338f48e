"""Is an annotation still what was written, with one row for every input? Reads every byte of it again."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from pipelines import storage
from pipelines.annotation.ledger import AnnotationManifest, superseded
from pipelines.annotation.parts import PartEntry, describe
from pipelines.annotation.plan import AnnotationPlan, load_plan
from pipelines.preparation.chunks import Chunk
from pipelines.preparation.plan import PLAN_NAME
from pipelines.records import FileFormatError
from pipelines.shards.receipts import AccountingError, account
from pipelines.stored_models import StoredModelError

_THREADS = 4


def verify(folder: str) -> list[str]:
    """One line for everything of the annotation in `folder` that is missing, or not as the manifest and the plan say.

    Raises:
        ManifestError: `folder` holds no finished annotation.
    """
    manifest = AnnotationManifest.load(folder)
    try:
        plan = load_plan(folder)
    except StoredModelError as error:
        return [str(error)]
    if plan is None or plan.identity() != manifest.plan:
        found = plan.identity() if plan else "no such file"
        return [f"{storage.join(folder, PLAN_NAME)}: expected the plan with sha256 {manifest.plan}, found {found}"]
    if len(plan.chunks) != len(manifest.parts):
        return [f"{folder}: {len(manifest.parts)} parts for {len(plan.chunks)} chunks"]

    def faults(pair: tuple[Chunk, PartEntry]) -> list[str]:
        return list(_part_faults(folder, plan, *pair))

    with ThreadPoolExecutor(_THREADS) as threads:
        found_faults = threads.map(faults, zip(plan.chunks, manifest.parts, strict=True))
        lines = [line for lines in found_faults for line in lines]
    twice = superseded(folder, manifest)
    return [*lines, *(f"{uri}: its chunk was done anew; run the job again, which removes this part" for uri in twice)]


def _part_faults(folder: str, plan: AnnotationPlan, chunk: Chunk, entry: PartEntry) -> Iterator[str]:
    uri = storage.join(folder, entry.name)
    try:
        data = storage.read_bytes(uri)
    except FileNotFoundError:
        yield f"{uri}: expected {entry.bytes} bytes with sha256 {entry.sha256}, found no such file"
        return
    if len(data) != entry.bytes:
        yield f"{uri}: expected {entry.bytes} bytes, found {len(data)}"
        return
    if (found := storage.sha256(data)) != entry.sha256:
        yield f"{uri}: expected sha256 {entry.sha256}, found {found}"
        return
    try:
        account(plan.keys(chunk), describe(entry.name, data)[1], [])
    except (AccountingError, FileFormatError) as error:
        yield f"{uri}: {error}"
