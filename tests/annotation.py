"""A whole annotation in this process, for tests of everything about it that needs no Ray."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch

from pipelines import storage
from pipelines.annotate import model_identity
from pipelines.annotation.answering import Asker
from pipelines.annotation.chunks import ChunkAnnotator
from pipelines.annotation.ledger import AnnotationLedger, AnnotationManifest, PartReceipt
from pipelines.annotation.plan import AnnotationPlan, make_terms
from pipelines.annotation.pool import make_asker
from pipelines.annotation.settings import AnnotateSettings
from pipelines.preparation.chunks import check_rows, index_files, scans
from pipelines.preparation.row_images import source_files
from pipelines.preparation.settings import CONFIG_NAME
from pipelines.settings import dump_settings


def annotate_settings(folder: Path, **change: Any) -> AnnotateSettings:
    """Settings for the corpus.jsonl in `folder` and the checkpoint beside it, four rows to a chunk, short answers."""
    base = {
        "sources": [{"path": str(folder / "corpus.jsonl"), "image_root": str(folder)}],
        "output": str(folder / "out"),
        "checkpoint": str(folder / "model"),
        "max_tokens": 6,
        "chunk_rows": 4,
        "engine": {"max_slots": 4, "max_length": 512},
    }
    return AnnotateSettings(**base | change)


def begin(settings: AnnotateSettings) -> AnnotationLedger:
    """The ledger of `settings` with its plan written."""
    terms = make_terms(settings, model_identity(settings))
    paths = [source.path for source in terms.sources]
    lots = [index_files(lot, terms.sources, paths, terms.chunk_rows) for lot in scans(terms.sources)]
    chunks = [chunk for lot in lots for chunk in lot]
    check_rows(terms.sources, chunks)
    ledger = AnnotationLedger(settings.output, AnnotationPlan(terms=terms, chunks=chunks), settings.max_error_share)
    storage.write_bytes(storage.join(settings.output, CONFIG_NAME), dump_settings(settings).encode())
    return ledger


def annotator(ledger: AnnotationLedger, asker: Asker) -> ChunkAnnotator:
    terms = ledger.plan.terms
    return ChunkAnnotator(ledger.plan_identity, terms, source_files(terms.sources), ledger.output, asker)


def attempted(ledger: AnnotationLedger, annotate: ChunkAnnotator, number: int) -> PartReceipt:
    """What a worker does with a chunk."""
    return annotate(number, ledger.plan.chunks[number], ledger.attempt(number))


def annotate_here(settings: AnnotateSettings) -> AnnotationManifest:
    """What `annotate` does, one chunk after the other."""
    ledger = begin(settings)
    threads = torch.get_num_threads()
    asker = make_asker(settings, ledger.plan.terms.model, "token")
    try:
        annotate = annotator(ledger, asker)
        for number in ledger.pending:
            ledger.commit(attempted(ledger, annotate, number))
            ledger.check_share()
    finally:
        asker.close()
        torch.set_num_threads(threads)
    return ledger.publish()


def rows_of(output: str) -> list[dict[str, Any]]:
    """Every row of every part that lies there, whether or not anything names it."""
    folder = storage.join(output, "parts", "corpus")
    names = [name for name in storage.list_names(folder) if name.endswith(".parquet")]
    tables = [pq.read_table(storage.open_file(storage.join(folder, name))) for name in names]
    return [row for table in tables for row in table.to_pylist()]
