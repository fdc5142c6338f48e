"""From settings to a published dataset: the order of the steps, and nothing else.

plan -> chunks -> content-named shards -> one receipt per chunk -> manifest. A run that was killed leaves a plan and
some receipts; the next run with the same settings does the chunks that have none.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import groupby

import ray

from flashsloth import FlashSlothProcessor
from pipelines import storage
from pipelines.encode import EncoderError, EncoderFacts, encoder_facts
from pipelines.preparation.chain import run_chunks
from pipelines.preparation.data_receipt import LastRun
from pipelines.preparation.estimate import estimate_bytes, image_bytes
from pipelines.preparation.ledger import Ledger
from pipelines.preparation.plan import (
    Chunk,
    Plan,
    Terms,
    check_rows,
    code_identity,
    index_files,
    load_plan,
    scans,
)
from pipelines.preparation.processor import load_processor
from pipelines.preparation.progress import Progress
from pipelines.preparation.samples import SourceFiles
from pipelines.preparation.settings import CONFIG_NAME, PrepareSettings
from pipelines.preparation.sources import PlanError, SourceTerms, source_terms
from pipelines.ray_session import start_ray
from pipelines.settings import dump_settings
from pipelines.shards.manifest import MANIFEST_NAME, Manifest
from pipelines.shards.receipts import Receipt

_ENCODER_TRIES = 3
# A worker holds a chunk a few times over (samples, shard, its bytes); Ray advises blocks of 128 MB at most.
_BYTES_PER_CHUNK = 100 * 2**20
_ROWS_PER_CHUNK = 500  # of encoded images: about 75 MB


def prepare(settings: PrepareSettings) -> Manifest | None:
    """Carry out `settings`, from where an earlier run has come to. Prints what it does.

    Returns:
        The manifest; None for a dry run.

    Raises:
        ValueError: PlanError, PublishError, FileFormatError, StorageError, ...: one line that names file, row or field
            and what helps. Nothing is published then.
    """
    output = storage.resolve(settings.output)
    processor = load_processor(settings)
    terms = make_terms(settings, processor)
    plan = load_plan(output)
    if plan is not None:
        check_terms(output, plan.terms, terms)
    if plan is not None and storage.exists(storage.join(output, MANIFEST_NAME)):
        manifest = Manifest.load(output)
        print(f"{settings.output}: already prepared ({manifest.written:,} rows); nothing to do", flush=True)
        return manifest
    start_ray()
    files = tuple(_source_files(source) for source in terms.sources)
    plan = plan or make_plan(terms, files)
    print(_describe(plan), flush=True)
    if settings.dry_run:
        print(f"about {estimate_bytes(plan, files) / 1e9:,.3f} GB of shards, by a look at a few chunks", flush=True)
        return None
    ledger = Ledger(output, plan, settings.max_quarantined_share)
    storage.write_bytes(storage.join(output, CONFIG_NAME), dump_settings(settings).encode())
    begun_with, start = ledger.num_done, time.monotonic()
    _run(ledger, files, processor, settings)
    return ledger.publish(LastRun(rows=ledger.num_done - begun_with, seconds=time.monotonic() - start))


def make_terms(settings: PrepareSettings, processor: FlashSlothProcessor) -> Terms:
    """What decides the bytes of the dataset, read from `settings` and the files that they name."""
    tower = encoder_facts(settings.encoder.path) if settings.encoder else None
    shape = _image_shape(settings, processor, tower)
    dtype = settings.encoder.dtype if settings.encoder else "uint8" if settings.payload == "pixels" else None
    return Terms(
        sources=source_terms(settings.sources),
        layout=settings.layout,
        payload=settings.payload,
        max_length=settings.max_length or processor.max_length,
        chunk_rows=settings.chunk_rows or _chunk_rows(shape, dtype),
        tiling=processor.image_processor.tiling,
        num_image_tokens=processor.num_image_tokens,
        image_shape=shape,
        image_dtype=dtype,
        share_images=settings.share_images,
        processor_identity=processor.identity(),
        encoder_identity=tower.identity if tower else None,
        code=code_identity(),
    )


def make_plan(terms: Terms, files: tuple[SourceFiles, ...]) -> Plan:
    """Index the files, each in a task of its own, so that none passes through the driver."""
    index = ray.remote(index_files)
    paths = [file.path for file in files]
    lots = scans(terms.sources)
    parts: list[list[Chunk]] = ray.get([index.remote(lot, terms.sources, paths, terms.chunk_rows) for lot in lots])
    chunks = [chunk for part in parts for chunk in part]
    check_rows(terms.sources, chunks)
    return Plan(terms=terms, chunks=chunks)


def check_terms(output: str, planned: Terms, now: Terms) -> None:
    """Raise PlanError with every field in which `now` differs from what the folder `output` was planned with."""
    differences = planned.differences(now)
    if differences:
        raise PlanError(
            f"{output}: this folder holds a preparation with other terms: {'; '.join(differences)}. "
            "Run it with the terms it was begun with, or prepare into another output"
        )


def _run(
    ledger: Ledger, files: tuple[SourceFiles, ...], processor: FlashSlothProcessor, settings: PrepareSettings
) -> None:
    if ledger.receipts:
        print(f"resuming: {len(ledger.receipts)} of {len(ledger.plan.chunks)} chunks are done", flush=True)
    ledger.check_share()
    progress = Progress(ledger.plan.num_rows, ledger.num_done)
    if not ledger.pending:
        return

    def pending() -> Iterator[Receipt]:
        return run_chunks(ledger.plan, ledger.pending, files, ledger.output, processor, settings.encoder)

    try:
        for receipt in retried(pending):
            ledger.commit(receipt)
            ledger.check_share()
            progress.update(ledger.num_done, ledger.num_quarantined)
    finally:
        progress.finish(ledger.num_done, ledger.num_quarantined)


def retried(pending: Callable[[], Iterator[Receipt]]) -> Iterator[Receipt]:
    """The receipts of all pending chunks; begins anew, with new workers, where an accelerator fails.

    A CUDA error leaves its process unable to use the GPU, so only another process can show whether it was a passing
    one.

    Raises:
        EncoderError: it failed three times without a chunk done in between.
    """
    failures = 0
    while True:
        try:
            for receipt in pending():
                failures = 0
                yield receipt
            return
        except EncoderError as error:
            failures += 1
            if failures == _ENCODER_TRIES:
                raise
            print(f"{error}; trying again with new workers ({failures} of {_ENCODER_TRIES - 1})", flush=True)


def _source_files(source: SourceTerms) -> SourceFiles:
    return SourceFiles(storage.resolve(source.path), storage.resolve(source.image_root) if source.image_root else None)


def _image_shape(
    settings: PrepareSettings, processor: FlashSlothProcessor, tower: EncoderFacts | None
) -> list[int] | None:
    if settings.payload == "original":
        return None
    images = processor.image_processor
    if tower is None:
        return [images.num_tiles, 3, images.size, images.size]
    if tower.image_size != images.size:
        raise PlanError(
            f"encoder: the tower looks at {tower.image_size} pixels, the processor makes tiles of {images.size}"
        )
    return [images.num_tiles, tower.num_patches, tower.width]


def _chunk_rows(shape: list[int] | None, dtype: str | None) -> int:
    each = image_bytes(shape, dtype)
    return min(_ROWS_PER_CHUNK, max(1, _BYTES_PER_CHUNK // each)) if each else _ROWS_PER_CHUNK


def _describe(plan: Plan) -> str:
    rows: Counter[str] = Counter()
    for chunk in plan.chunks:
        rows[plan.terms.sources[chunk.source].corpus] += chunk.rows
    lines = []
    for corpus, members in groupby(plan.terms.sources, key=lambda source: source.corpus):
        first, *others = members
        lines.append(f"  {corpus}: {rows[corpus]:,} rows of {first.path}")
        lines[-1] += f" and {len(others):,} more files" if others else ""
    total = f"{plan.num_rows:,} rows in {len(plan.chunks):,} chunks, images as {plan.terms.payload}"
    return "\n".join([f"plan {plan.identity()[:12]}: {total}", *lines])
