"""The plan of an annotation: which rows, asked what, of which model. A folder holds the work of one plan."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path

from pipelines import storage
from pipelines.annotation import parts, questions
from pipelines.annotation.settings import AnnotateSettings, PartFormat
from pipelines.preparation.code import code_identity
from pipelines.preparation.plan import PLAN_NAME, CorpusPlan, SourcedTerms
from pipelines.preparation.sources import source_terms
from pipelines.serving.checkpoint_files import check_folder, exported_files, fetch


class AnnotationTerms(SourcedTerms):
    """All that decides what the answers are asked for, and how they are written."""

    model: str
    """Hash of the checkpoint, or `endpoint:` and the name of the model there."""
    prompt: str | None
    max_tokens: int
    temperature: float
    top_p: float
    stop: list[str]
    seed: int
    format: PartFormat
    as_corpus: bool
    chunk_rows: int
    code: str


class AnnotationPlan(CorpusPlan):
    """Terms and chunks. Equal inputs give an equal plan."""

    terms: AnnotationTerms


def make_terms(settings: AnnotateSettings, model: str) -> AnnotationTerms:
    """The terms of `settings`, with the fingerprints of the files that they name."""
    own = "".join(inspect.getsource(module) for module in (parts, questions))
    same = AnnotationTerms.model_fields.keys() - {"sources", "model", "code"}
    return AnnotationTerms(
        sources=source_terms(settings.sources),
        model=model,
        code=storage.sha256((code_identity() + own).encode()),
        **settings.model_dump(include=set(same)),
    )


def load_plan(output: str) -> AnnotationPlan | None:
    """The plan that the folder `output` belongs to; None in a folder without one."""
    try:
        return AnnotationPlan.model_validate_json(storage.read_bytes(storage.join(output, PLAN_NAME)))
    except FileNotFoundError:
        return None


def checkpoint_identity(checkpoint: str) -> str:
    """The sha256 over the names and hashes of a checkpoint's files: what tells one model from another.

    An export lists the hashes of its files, so that a remote one need not be read for it.

    Raises:
        CheckpointError: there is no checkpoint that can be served, or its list of files cannot be read.
    """
    check_folder(checkpoint)
    files = exported_files(checkpoint)
    if files is None:
        files = {path.name: _sha256(path) for path in fetch(checkpoint).iterdir() if path.is_file()}
    return storage.sha256(repr(sorted(files.items())).encode())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
