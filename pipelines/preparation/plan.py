"""The plan: what will be prepared, from what, by what, cut into chunks. Everything that decides a byte is in it.

A folder holds the work of one plan. Whoever comes later with other terms is told which, and writes nothing.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from hashlib import blake2b
from itertools import count, groupby, islice
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict

from flashsloth import conversation, image_processing_flashsloth, processing_flashsloth
from pipelines import records, storage
from pipelines.corpora import FORMATS, fields, json_rows, spans
from pipelines.corpora.spans import Extent, Span
from pipelines.preparation.settings import SourceSettings
from pipelines.records import Row
from pipelines.shards import images, quantization, schema, writer
from pipelines.shards.manifest import Layout, Payload

PLAN_NAME = "plan.json"
_THREADS = 16  # an object store answers in tens of milliseconds


class PlanError(ValueError):
    """The plan cannot be made, or it is not the plan of the folder that it is meant for."""


class SourceTerms(BaseModel):
    """One file of a source as it was when the plan was made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """First part of its rows' keys: the source's name, and where the source has several files, `/` and the file's."""
    format: str
    path: str
    image_root: str | None
    limit: int | None
    weight: float = 1.0
    gif: bool = False
    fingerprint: str

    @property
    def corpus(self) -> str:
        """Name of the source that the file belongs to."""
        return self.name.partition("/")[0]


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
    """Planned rows: those that lie in the chunk and are taken."""
    first_line: int
    repeat: int = 0
    """0 for the first time that its rows are taken, 1 for the second, ..."""

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
        source = self.terms.sources[chunk.source]
        taken = (row for row in count(chunk.first_row) if is_taken(source, row, chunk.repeat))
        return [row_key(source.name, row, chunk.repeat) for row in islice(taken, chunk.rows)]


def row_key(source: str, position: int, repeat: int = 0) -> str:
    """The key of a row: its source and its place in it. The corpus's own id may repeat, this cannot.

    Where a row is taken once more, its key says so: `mix:12`, `mix:12+1`.
    """
    return f"{source}:{position}" + (f"+{repeat}" if repeat else "")


def is_taken(source: SourceTerms, position: int, repeat: int) -> bool:
    """Whether the row at `position` is taken, for the first time (`repeat` 0) or once more, by the source's weight.

    It is decided by a hash of the row's key, so it hangs on no other row, and a higher weight keeps what a lower took.
    """
    share = source.weight - repeat
    if share >= 1:
        return True
    digest = blake2b(row_key(source.name, position).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def read_chunk(source: SourceTerms, path: str, chunk: Chunk) -> list[Row]:
    """The planned rows of `chunk`, in order, from the file that this process finds at `path`."""
    rows = FORMATS[source.format].read(path, chunk.span)
    return [row for row in rows if is_taken(source, row.position, chunk.repeat)]


def load_plan(output: str) -> Plan | None:
    """The plan that the folder `output` belongs to; None in a folder without one."""
    try:
        return Plan.model_validate_json(storage.read_bytes(storage.join(output, PLAN_NAME)))
    except FileNotFoundError:
        return None


def source_terms(sources: Sequence[SourceSettings]) -> list[SourceTerms]:
    """The files of `sources`, in order, each with its fingerprint.

    Raises:
        PlanError: there is no such file, it may not be read, or two sources have it.
    """
    named = [(source, *each) for source in sources for each in _files(source)]
    seen: dict[str, str] = {}
    for source, name, path in named:
        other = seen.setdefault(storage.resolve(path), name)
        if other != name:
            raise PlanError(f"source '{source.name}': {path} belongs to source '{other}' too; list each file once")
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(_file_terms, named))


def _files(source: SourceSettings) -> Iterator[tuple[str, str]]:
    if not storage.is_pattern(source.path):
        yield source.name, source.path
        return
    found = storage.match(source.path)
    if not found:
        raise PlanError(f"source '{source.name}': no file matches {source.path}")
    for name, path in found.items():
        yield f"{source.name}/{name}", path


def _file_terms(named: tuple[SourceSettings, str, str]) -> SourceTerms:
    source, name, path = named
    try:
        fingerprint = storage.fingerprint(path)
    except (FileNotFoundError, PermissionError) as error:
        raise PlanError(f"source '{source.name}': {path} cannot be read ({type(error).__name__})") from error
    return SourceTerms(**{**source.model_dump(), "name": name, "path": path}, fingerprint=fingerprint)


def scans(sources: Sequence[SourceTerms]) -> list[range]:
    """The files, by number, that must be indexed together, each lot apart from the others.

    A limit counts the rows of all files of a source; without one, every file stands for itself.
    """
    lots = []
    for _, members in groupby(enumerate(sources), key=lambda each: each[1].corpus):
        numbers = [number for number, _ in members]
        whole = range(numbers[0], numbers[-1] + 1)
        lots += [whole] if sources[numbers[0]].limit else [range(number, number + 1) for number in whole]
    return lots


def index_files(numbers: range, sources: Sequence[SourceTerms], paths: Sequence[str], chunk_rows: int) -> list[Chunk]:
    """The chunks of the files `numbers` of one source. A worker finds file number k at `paths[k]`.

    Raises:
        FileFormatError: a file as a whole is not of the source's format.
    """
    chunks: list[Chunk] = []
    left = sources[numbers[0]].limit
    for number in numbers:
        source = sources[number]
        num_rows = 0
        for repeat in range(math.ceil(source.weight)):
            extents = _Counted(FORMATS[source.format].scan(paths[number]), left)
            takes = None if source.weight >= repeat + 1 else partial(is_taken, source, repeat=repeat)
            found = spans.group(extents, chunk_rows, takes)
            chunks += [Chunk(source=number, repeat=repeat, **dataclasses.asdict(span)) for span in found]
            num_rows = extents.count
        if left is not None:
            left -= num_rows
            if left <= 0:
                break
    return chunks


def check_rows(sources: Sequence[SourceTerms], chunks: Sequence[Chunk]) -> None:
    """Raise PlanError for a source that has no row in `chunks`."""
    held = {sources[chunk.source].corpus for chunk in chunks}
    empty = next((source for source in sources if source.corpus not in held), None)
    if empty is not None:
        raise PlanError(f"source '{empty.corpus}': {empty.path} holds no rows")


class _Counted:
    """The first `limit` of `extents`, counted as they pass."""

    def __init__(self, extents: Iterator[Extent], limit: int | None) -> None:
        self._extents = islice(extents, limit)
        self.count = 0

    def __iter__(self) -> Iterator[Extent]:
        for extent in self._extents:
            self.count += 1
            yield extent


def code_identity() -> str:
    """The sha256 of the code that decides what a row becomes."""
    modules: list[ModuleType] = [
        conversation,
        image_processing_flashsloth,
        processing_flashsloth,
        fields,
        json_rows,
        spans,
        *(FORMATS[name] for name in sorted(FORMATS)),  # type: ignore[list-item]  # modules, seen as what they offer
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
