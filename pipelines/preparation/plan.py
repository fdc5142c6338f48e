"""The plan: what will be prepared, from what, by what, cut into chunks. Everything that decides a byte is in it.

A folder holds the work of one plan. Whoever comes later with other terms is told which, and writes nothing.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict

from flashsloth import conversation, image_processing_flashsloth, processing_flashsloth
from pipelines import records, storage
from pipelines.corpora import FORMATS, json_rows, llava, spans
from pipelines.corpora.spans import Span
from pipelines.preparation.settings import SourceSettings
from pipelines.shards import images, quantization, schema, writer
from pipelines.shards.manifest import Layout, Payload

PLAN_NAME = "plan.json"


class PlanError(ValueError):
    """The plan cannot be made, or it is not the plan of the folder that it is meant for."""


class SourceTerms(BaseModel):
    """A source as it was when the plan was made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    format: str
    path: str
    image_root: str | None
    limit: int | None
    fingerprint: str


class Terms(BaseModel):
    """All that decides what the dataset will hold."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sources: list[SourceTerms]
    layout: Layout
    payload: Payload
    max_length: int
    chunk_rows: int
    tiling: str
    num_image_tokens: int
    image_shape: list[int] | None
    """Shape of every stored array; None where images stay encoded."""
    image_dtype: str | None = None
    """Type of every stored array: uint8, float16, int8; None where images stay encoded."""
    share_images: bool = False
    processor_identity: str
    encoder_identity: str | None
    code: str

    def differences(self, other: Terms) -> list[str]:
        """One line per field in which `other` differs."""
        mine, theirs = (dict(_flatten(terms.model_dump())) for terms in (self, other))
        fields = [field for field in {**mine, **theirs} if mine.get(field) != theirs.get(field)]
        return [f"{field}: was {mine.get(field)!r}, now {theirs.get(field)!r}" for field in fields]


class Chunk(BaseModel):
    """A run of rows of one source: the unit of work, of resuming and of a shard."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: int
    start: int
    stop: int
    first_row: int
    rows: int
    first_line: int

    @property
    def span(self) -> Span:
        """Where the chunk's rows lie in the source's file."""
        return Span(self.start, self.stop, self.first_row, self.rows, self.first_line)


class Plan(BaseModel):
    """Terms and chunks. Equal inputs give an equal plan."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    terms: Terms
    chunks: list[Chunk]

    @property
    def num_rows(self) -> int:
        """Rows of all chunks."""
        return sum(chunk.rows for chunk in self.chunks)

    def to_json(self) -> bytes:
        """The bytes that are stored."""
        return self.model_dump_json().encode()

    def identity(self) -> str:
        """The sha256 of the plan, which its receipts and its manifest carry."""
        return storage.sha256(self.to_json())

    def keys(self, chunk: Chunk) -> list[str]:
        """The keys of the rows of `chunk`, in order."""
        name = self.terms.sources[chunk.source].name
        return [row_key(name, chunk.first_row + row) for row in range(chunk.rows)]


def row_key(source: str, position: int) -> str:
    """The key of a row: its source and its place in it. The corpus's own id may repeat, this cannot."""
    return f"{source}:{position}"


def load_plan(output: str) -> Plan | None:
    """The plan that the folder `output` belongs to; None in a folder without one."""
    try:
        return Plan.model_validate_json(storage.read_bytes(storage.join(output, PLAN_NAME)))
    except FileNotFoundError:
        return None


def source_terms(source: SourceSettings) -> SourceTerms:
    """`source` with the fingerprint of its file.

    Raises:
        PlanError: there is no such file, or it may not be read.
    """
    try:
        fingerprint = storage.fingerprint(source.path)
    except (FileNotFoundError, PermissionError) as error:
        raise PlanError(f"source '{source.name}': {source.path} cannot be read ({type(error).__name__})") from error
    return SourceTerms(**source.model_dump(), fingerprint=fingerprint)


def index_source(number: int, source: SourceTerms, path: str, chunk_rows: int) -> list[Chunk]:
    """The chunks of source number `number`, whose file a worker finds at `path`.

    Raises:
        PlanError: the file holds no rows.
        FileFormatError: the file as a whole is not of the source's format.
    """
    extents = FORMATS[source.format].scan(path)
    found = spans.group(extents, chunk_rows, source.limit)
    chunks = [Chunk(source=number, **dataclasses.asdict(span)) for span in found]
    if not chunks:
        raise PlanError(f"source '{source.name}': {source.path} holds no rows")
    return chunks


def code_identity() -> str:
    """The sha256 of the code that decides what a row becomes."""
    modules: list[ModuleType] = [
        conversation,
        image_processing_flashsloth,
        processing_flashsloth,
        json_rows,
        llava,
        records,
        quantization,
        images,
        schema,
        writer,
    ]
    return storage.sha256("".join(inspect.getsource(module) for module in modules).encode())


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path, value
        return
    for name, part in items:
        yield from _flatten(part, f"{path}.{name}" if path else str(name))
