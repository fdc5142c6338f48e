"""From settings to a finished annotation: the order of the steps, and nothing else.

plan -> chunks -> chunk-named parts -> one receipt per chunk -> manifest. A run that was killed leaves a plan, parts and
some receipts; the next run with the same settings does the chunks that have no part, and takes over those that have.
A chunk whose part is lost or damaged after its receipt was put is done anew, under another name.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from pipelines import storage
from pipelines.annotation.ledger import AnnotationLedger, AnnotationManifest, PartReceipt, remove_superseded
from pipelines.annotation.plan import AnnotationPlan, load_plan, make_terms
from pipelines.annotation.pool import run_chunks
from pipelines.annotation.settings import AnnotateSettings
from pipelines.preparation.indexing import plan_chunks
from pipelines.preparation.outputs import check_writable
from pipelines.preparation.plan import check_terms
from pipelines.preparation.row_images import source_files
from pipelines.preparation.settings import CONFIG_NAME
from pipelines.preparation.work_loop import work_off
from pipelines.ray_session import start_ray
from pipelines.serving.checkpoint_files import checkpoint_identity
from pipelines.settings import dump_settings
from pipelines.shards.manifest import MANIFEST_NAME
from pipelines.shards.receipts import describe_done

_TOKEN = "OPENAI_API_KEY"  # of the environment: a secret is no argument, so it reaches no recipe and no log


def annotate(settings: AnnotateSettings) -> AnnotationManifest | None:
    """Carry out `settings`, from where an earlier run has come to. Prints what it does.

    Returns:
        The manifest; None for a dry run.

    Raises:
        ValueError: PlanError, PublishError, CheckpointError, EndpointError, StorageError, ...: one line that names
            file, row or field and what helps. Nothing is published then.
    """
    output = storage.resolve(settings.output)
    if settings.checkpoint is not None:
        settings = settings.model_copy(update={"checkpoint": storage.resolve(settings.checkpoint)})
    terms = make_terms(settings, model_identity(settings))
    plan = load_plan(output)
    if plan is not None:
        check_terms(output, plan.terms, terms)
    if plan is not None and storage.exists(storage.join(output, MANIFEST_NAME)):
        manifest = AnnotationManifest.load(output)
        print(f"{settings.output}: already annotated ({manifest.rows:,} rows); nothing to do", flush=True)
        if not settings.dry_run:
            remove_superseded(output, manifest)  # of a run that was killed after its manifest
        return manifest
    if plan is None and not settings.dry_run:
        check_writable(output, settings)
    start_ray()
    files = source_files(terms.sources)
    is_new = plan is None
    plan = plan or AnnotationPlan(terms=terms, chunks=plan_chunks(terms.sources, files, terms.chunk_rows))
    print(plan.describe(f"answers as {terms.format}"), flush=True)
    if settings.dry_run:
        if not is_new:
            print(describe_done(output, len(plan.chunks)), flush=True)
        return None
    ledger = AnnotationLedger(output, plan, settings.max_error_share)
    storage.write_bytes(storage.join(output, CONFIG_NAME), dump_settings(settings).encode())

    def run(pending: list[int]) -> Iterator[PartReceipt]:
        attempts = {number: ledger.attempt(number) for number in pending}
        return run_chunks(plan, attempts, files, output, settings, _token())

    work_off(ledger, run)
    return ledger.publish()


def model_identity(settings: AnnotateSettings) -> str:
    """What tells the model that answers from others: the checkpoint's hash, or what the endpoint says of it."""
    if settings.endpoint:
        from pipelines.annotation.endpoint import served_model  # with the model's libraries, seconds to import

        return f"endpoint:{served_model(settings.endpoint, _token())}"
    assert settings.checkpoint is not None
    return checkpoint_identity(settings.checkpoint)


def _token() -> str:
    token = os.environ.get(_TOKEN, "").strip() or "none"  # one that was read from a file ends in a line break
    if not token.isascii() or not token.isprintable():
        raise ValueError(f"{_TOKEN} holds characters that no header may: it is no token")
    return token
