"""The plan of an annotation: which rows, asked what, of which model. A folder holds the work of one plan."""

from __future__ import annotations

import inspect

from pipelines import storage
from pipelines.annotation import parts, questions
from pipelines.annotation.settings import AnnotateSettings, PartFormat
from pipelines.preparation.code import code_identity
from pipelines.preparation.plan import PLAN_NAME, CorpusPlan, SourcedTerms
from pipelines.preparation.settings import CONFIG_NAME
from pipelines.preparation.sources import check_output, source_terms
from pipelines.shards.manifest import MANIFEST_NAME
from pipelines.shards.receipts import receipt_name


class AnnotationTerms(SourcedTerms):
    """All that decides what the answers are asked for, and how they are written."""

    model: str
    """Hash of the checkpoint, or `endpoint:` and what `served_model` says."""
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
    """The terms of `settings`, with the fingerprints of the files that they name.

    Raises: as `source_terms`; PlanError: a source's pattern matches what is written.
    """
    written = (PLAN_NAME, CONFIG_NAME, MANIFEST_NAME, receipt_name(0), parts.part_name("any", 0, settings.format))
    check_output(settings.sources, settings.output, written)
    own = "".join(inspect.getsource(module) for module in (parts, questions))
    same = AnnotationTerms.model_fields.keys() - {"sources", "model", "code"}
    return AnnotationTerms(
        sources=source_terms(settings.sources),
        model=model,
        code=storage.sha256((code_identity() + own).encode()),
        **settings.model_dump(include=set(same)),
    )


def load_plan(output: str) -> AnnotationPlan | None:
    """As `CorpusPlan.load`, for an annotation."""
    return AnnotationPlan.load(output)
