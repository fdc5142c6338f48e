"""A whole preparation in this process, for tests of what comes after it and needs no Ray."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipelines import storage
from pipelines.preparation.chain import FeatureActor, Work, write_chunk
from pipelines.preparation.chunks import check_rows, index_files, scans
from pipelines.preparation.ledger import Ledger
from pipelines.preparation.pinning import find_pins
from pipelines.preparation.plan import Plan, Terms, load_plan
from pipelines.preparation.processor import load_processor
from pipelines.preparation.row_images import SourceFiles
from pipelines.preparation.samples import SampleMaker
from pipelines.preparation.settings import CONFIG_NAME, PrepareSettings
from pipelines.preparation.sources import SourceTerms
from pipelines.prepare import make_terms
from pipelines.settings import dump_settings
from pipelines.shards.images import ImageStore
from pipelines.shards.manifest import Manifest
from pipelines.shards.receipts import Receipt


def prepare_settings(folder: Path, **change: Any) -> PrepareSettings:
    """Settings for the corpus.jsonl and the processor in `folder`, four rows to a chunk."""
    base = {
        "sources": [{"path": str(folder / "corpus.jsonl"), "image_root": str(folder)}],
        "output": str(folder / "out"),
        "processor": str(folder / "processor"),
        "chunk_rows": 4,
    }
    return PrepareSettings(**base | change)


def plan_terms(sources: list[SourceTerms], chunk_rows: int, **change: Any) -> Terms:
    """Terms of a plan for `pixels` with 9 visual tokens, 500 tokens a row at most, that names no processor."""
    base = {"layout": "chat", "payload": "pixels", "max_length": 500, "tiling": "base", "num_image_tokens": 9}
    unnamed = {"image_shape": None, "processor_identity": "", "encoder_identity": None, "code": ""}
    return Terms(sources=sources, chunk_rows=chunk_rows, **base | unnamed | change)


def begin(settings: PrepareSettings) -> tuple[Ledger, SampleMaker]:
    """The ledger of `settings` with its plan written, and what makes the samples of its chunks."""
    processor = load_processor(settings)
    terms = make_terms(settings, processor)
    paths = [source.path for source in terms.sources]
    lots = [index_files(lot, terms.sources, paths, terms.chunk_rows) for lot in scans(terms.sources)]
    chunks = [chunk for lot in lots for chunk in lot]
    check_rows(terms.sources, chunks)
    files = [SourceFiles(source.path, source.image_root) for source in terms.sources]
    plan, pins = load_plan(settings.output), None
    if plan is None:
        pins = find_pins(terms.sources, files, chunks) if terms.pin_images else None
        plan = Plan(terms=terms, chunks=chunks, pins=pins.facts() if pins else None)
        if pins:
            pins.store(settings.output)
    ledger = Ledger(settings.output, plan, settings.max_quarantined_share)
    storage.write_bytes(storage.join(settings.output, CONFIG_NAME), dump_settings(settings).encode())
    pins = plan.load_pins(settings.output)
    store = ImageStore(settings.output) if settings.share_images else None
    return ledger, SampleMaker(terms, files, processor, store=store, pins=pins)


def do_chunk(
    ledger: Ledger, maker: SampleMaker, number: int, features: Callable[[pa.Table], pa.Table] | None = None
) -> Receipt:
    """Write one chunk's shard; its receipt is not committed."""
    samples = maker(number, ledger.plan.chunks[number])
    samples = features(samples) if features else samples
    work: Any = Work(ledger.plan_identity, ledger.plan.terms, (), ledger.output, None)  # type: ignore[arg-type]
    [text] = write_chunk.__wrapped__(samples, work)["receipt"].to_pylist()  # without what carries errors through Ray
    return Receipt.model_validate_json(text)


def prepare_here(settings: PrepareSettings) -> Manifest:
    """What `prepare` does, one chunk after the other."""
    ledger, maker = begin(settings)
    features = FeatureActor(settings.encoder) if settings.encoder else None
    for number in ledger.pending:
        ledger.commit(do_chunk(ledger, maker, number, features))
    return ledger.publish()
