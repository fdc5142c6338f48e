"""From settings to a published dataset: the order of the steps, and nothing else.

plan -> chunks -> content-named shards -> one receipt per chunk -> manifest. A run that was killed leaves a plan and
some receipts; the next run with the same settings does the chunks that have none.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from flashsloth import FlashSlothProcessor
from pipelines import storage
from pipelines.encode import EncoderFacts, encoder_facts
from pipelines.hub import for_any_process, is_missing, where
from pipelines.preparation.chain import run_chunks
from pipelines.preparation.code import code_identity, library_versions
from pipelines.preparation.data_receipt import RECEIPT_JSON, LastRun
from pipelines.preparation.estimate import estimate_bytes, image_bytes
from pipelines.preparation.image_pins import ImagePins
from pipelines.preparation.indexing import pin_images, plan_chunks
from pipelines.preparation.ledger import QUARANTINE_NAME, Ledger
from pipelines.preparation.outputs import check_writable
from pipelines.preparation.plan import PLAN_NAME, Plan, Terms, check_terms, load_plan
from pipelines.preparation.processor import load_processor
from pipelines.preparation.row_images import SourceFiles, source_files
from pipelines.preparation.settings import CONFIG_NAME, PrepareSettings
from pipelines.preparation.sources import PlanError, check_output, source_terms
from pipelines.preparation.work_loop import work_off
from pipelines.ray_session import start_ray
from pipelines.settings import dump_settings
from pipelines.shards.manifest import MANIFEST_NAME, Manifest
from pipelines.shards.receipts import Receipt, describe_done, receipt_name

# A worker holds a chunk twice (samples, shard). Larger ones leave workers idle at the end, while the last is done;
# smaller ones cost the driver, which spends about 25 ms on each.
_BYTES_PER_CHUNK = 50_000_000
_ROWS_PER_CHUNK = 500  # of encoded images: about 75 MB
# Below the output, by names that a pattern of corpora could match.
_WRITTEN = (PLAN_NAME, CONFIG_NAME, MANIFEST_NAME, QUARANTINE_NAME, RECEIPT_JSON, receipt_name(0))


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
    if plan is None and not settings.dry_run:
        check_writable(output, settings)
    start_ray()
    files = source_files(terms.sources)
    is_new = plan is None
    plan, pins = make_plan(terms, files) if plan is None else (plan, plan.load_pins(output))
    print(plan.describe(f"images as {terms.payload}"), flush=True)
    if settings.dry_run:
        print(f"about {estimate_bytes(plan, files) / 1e9:,.3f} GB of shards, by a look at a few chunks", flush=True)
        if not is_new:
            print(describe_done(output, len(plan.chunks)), flush=True)
        return None
    if is_new and pins:
        pins.store(output)
    ledger = Ledger(output, plan, settings.max_quarantined_share)
    storage.write_bytes(storage.join(output, CONFIG_NAME), dump_settings(settings).encode())
    begun_with, start = ledger.num_done, time.monotonic()

    encoder = settings.encoder
    if encoder:
        encoder = encoder.model_copy(update={"path": for_any_process(encoder.path)})

    def run(pending: list[int]) -> Iterator[Receipt]:
        return run_chunks(plan, pending, files, output, processor, encoder, pins)

    work_off(ledger, run)
    return ledger.publish(LastRun(rows=ledger.num_done - begun_with, seconds=time.monotonic() - start))


def make_plan(terms: Terms, files: Sequence[SourceFiles]) -> tuple[Plan, ImagePins | None]:
    """The plan of `terms` as its inputs are now, and its pins."""
    chunks = plan_chunks(terms.sources, files, terms.chunk_rows)
    pins = pin_images(terms.sources, files, chunks) if terms.pin_images else None
    return Plan(terms=terms, chunks=chunks, pins=pins.facts() if pins else None), pins


def make_terms(settings: PrepareSettings, processor: FlashSlothProcessor) -> Terms:
    """What decides the bytes of the dataset, read from `settings` and the files that they name.

    Raises: as `source_terms`; PlanError: a source's pattern matches what is written, or the tower does not fit.
    """
    check_output(settings.sources, settings.output, _WRITTEN)
    tower = _tower(settings.encoder.path) if settings.encoder else None
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
        pin_images=settings.pin_images,
        processor_identity=processor.identity(),
        encoder_identity=tower.identity if tower else None,
        code=code_identity(),
        libraries=library_versions(tower is not None),
    )


def _tower(path: str) -> EncoderFacts:
    if is_missing(path):
        raise PlanError(f"encoder: {where(path, True)} holds no tower to load")
    try:
        return encoder_facts(path)
    except (OSError, ValueError) as error:
        fault = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise PlanError(f"encoder: {path} holds no tower to load: {fault}") from error


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
