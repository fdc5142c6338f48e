"""The plan: what will be prepared, from what, by what, cut into chunks. Everything that decides a byte is in it.

A folder holds the work of one plan. Whoever comes later with other terms is told which, and writes nothing.

Its inputs are pinned: the files of the corpora, with the images that lie in them (parquet, webdataset), by fingerprints
in the terms; images that rows name by their paths by a table beside the plan (`image_pins`). What is read in another
state, by a resumed run too, ends the work with an error that names it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count, groupby, islice
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from pipelines import storage
from pipelines.corpora import FORMATS, spans
from pipelines.corpora.spans import Extent, Span
from pipelines.preparation.image_pins import ImagePins, PinFacts
from pipelines.preparation.sources import (
    PlanError,
    SourceTerms,
    check_unchanged,
    is_taken,
    row_key,
    source_differences,
)
from pipelines.records import FileFormatError, Row
from pipelines.shards.manifest import Layout, Payload
from pipelines.stored_models import load_model

PLAN_NAME = "plan.json"
# Nothing is lost with a plan: its receipts name it by its hash, so they fit the same plan, made again, and no other.
_REMEDY = (
    "restore it, or choose another output. If it was cut or changed, it may also be removed: the job, run again as "
    "before, makes the same plan of the same inputs and keeps what is done"
)

MISSING_PLAN = "restore it, or run the job again as before: it makes the same plan of the same inputs, no chunk anew"
"""What helps where a finished dataset has lost its plan."""
_DIFFERENCES = 20  # that an error tells: a source may have ten thousand files


class SourcedTerms(BaseModel):
    """What decides the bytes of an output that is made of corpora."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sources: list[SourceTerms]

    def differences(self, other: SourcedTerms) -> list[str]:
        """One line per field in which `other` differs; files of sources go by their names."""
        mine, theirs = (dict(_flatten(terms.model_dump(exclude={"sources"}))) for terms in (self, other))
        fields = [field for field in {**mine, **theirs} if mine.get(field) != theirs.get(field)]
        lines = [f"{field}: was {mine.get(field)!r}, now {theirs.get(field)!r}" for field in fields]
        return [*source_differences(self.sources, other.sources), *lines]


class Terms(SourcedTerms):
    """All that decides what the dataset will hold."""

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
    pin_images: bool = False
    processor_identity: str
    encoder_identity: str | None
    code: str
    """The sha256 of our own code that decides a row."""
    libraries: dict[str, str] = Field(default_factory=dict)
    """Name -> version of those that make ids, pixels and features."""


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
    # A plan that was made before there were sizes keeps its identity, by which its receipts and its manifest name it.
    size: int = Field(default=0, exclude_if=lambda size: size == 0)
    """Bytes of its rows and of the images that they bring, about."""
    repeat: int = 0
    """0 for the first time that its rows are taken, 1 for the second, ..."""

    @property
    def span(self) -> Span:
        """Where the chunk's rows lie in the source's file."""
        return Span(self.start, self.stop, self.first_row, self.rows, self.first_line, self.size)


class CorpusPlan(BaseModel):
    """Terms and chunks. Equal inputs give an equal plan."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    terms: SourcedTerms
    chunks: list[Chunk]

    @property
    def num_rows(self) -> int:
        """Rows of all chunks."""
        return sum(chunk.rows for chunk in self.chunks)

    def describe(self, how: str) -> str:
        """A line for all, which says `how` as well, and one for each source."""
        rows: Counter[str] = Counter()
        for chunk in self.chunks:
            rows[self.terms.sources[chunk.source].corpus] += chunk.rows
        lines = [f"plan {self.identity()[:12]}: {self.num_rows:,} rows in {len(self.chunks):,} chunks, {how}"]
        for corpus, members in groupby(self.terms.sources, key=lambda source: source.corpus):
            first, *others = members
            lines.append(f"  {corpus}: {rows[corpus]:,} rows of {first.path}")
            lines[-1] += f" and {len(others):,} more files" if others else ""
        return "\n".join(lines)

    @classmethod
    def load(cls, output: str) -> Self | None:
        """The plan that the folder `output` belongs to; None in a folder without one.

        Raises:
            StoredModelError: it is damaged, or of another job.
        """
        try:
            return load_model(cls, storage.join(output, PLAN_NAME), "a plan of this job", _REMEDY)
        except (FileNotFoundError, NotADirectoryError):
            return None

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


class Plan(CorpusPlan):
    """The plan of a preparation."""

    terms: Terms
    pins: PinFacts | None = None
    """Of the images that rows name; None where there are no such rows, or images may change."""

    def load_pins(self, output: str) -> ImagePins | None:
        """Its pins, from the folder `output`. Raises: as `ImagePins.load`."""
        return ImagePins.load(output, self.pins) if self.pins else None

    def describe(self, how: str) -> str:
        """As of any plan, with a line for the pins."""
        text = super().describe(how)
        if self.pins is None:
            return text
        there = self.pins.images - self.pins.absent
        text += f"\n  images that rows name: {there:,} pinned as they are"
        text += f", {self.pins.absent:,} not there" if self.pins.absent else ""
        unpinned = f", {self.pins.unpinned:,} not pinned (their folders may not be listed)"
        return text + (unpinned if self.pins.unpinned else "")


def check_terms(output: str, planned: SourcedTerms, now: SourcedTerms) -> None:
    """Raise PlanError with every field in which `now` differs from what the folder `output` was planned with."""
    differences = planned.differences(now)
    if len(differences) > _DIFFERENCES:
        differences = [*differences[:_DIFFERENCES], f"and {len(differences) - _DIFFERENCES:,} more"]
    if differences:
        raise PlanError(
            f"{output}: this folder was begun with other terms: {'; '.join(differences)}. "
            "Run it with the terms it was begun with, or choose another output"
        )


def load_plan(output: str) -> Plan | None:
    """As `CorpusPlan.load`, for a preparation."""
    return Plan.load(output)


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
        whole, part = divmod(source.weight, 1)
        num_rows = 0
        with _naming(source):
            if whole:
                extents = _Counted(FORMATS[source.format].scan(paths[number]), left)
                found = [dataclasses.asdict(span) for span in spans.group(extents, chunk_rows)]
                chunks += [Chunk(source=number, repeat=n, **span) for n in range(int(whole)) for span in found]
                num_rows = extents.count
            if part:
                extents = _Counted(FORMATS[source.format].scan(paths[number]), left)
                takes = partial(is_taken, source, repeat=int(whole))
                found = [dataclasses.asdict(span) for span in spans.group(extents, chunk_rows, takes)]
                chunks += [Chunk(source=number, repeat=int(whole), **span) for span in found]
                num_rows = extents.count
        if left is not None:
            left -= num_rows
            if left <= 0:
                break
    return chunks


@contextmanager
def _naming(source: SourceTerms) -> Iterator[None]:
    try:
        yield
    except FileFormatError as error:
        raise FileFormatError(f"source '{source.name}': {error}") from error


def read_chunk(source: SourceTerms, path: str, chunk: Chunk) -> list[Row]:
    """The planned rows of `chunk`, in order, from the file that this process finds at `path`.

    Raises:
        PlanError: the file has changed since the plan was made.
        FileFormatError: it has not, and cannot be read.
    """
    if source.format == "images":
        check_unchanged(source, path)  # before: the rows come out of the listing that this looks at
    try:
        rows = [
            row for row in FORMATS[source.format].read(path, chunk.span) if is_taken(source, row.position, chunk.repeat)
        ]
    except FileFormatError:
        check_unchanged(source, path)
        raise
    check_unchanged(source, path)  # after reading, so that a change before it or meanwhile is seen
    if len(rows) != chunk.rows:
        raise PlanError(
            f"source '{source.name}': {source.path} has {len(rows)} rows where {chunk.rows} were planned; prepare it "
            "into another output"
        )
    return rows


def check_rows(sources: Sequence[SourceTerms], chunks: Sequence[Chunk]) -> None:
    """Raise PlanError for a source that has no row in `chunks`."""
    held = {sources[chunk.source].corpus for chunk in chunks}
    empty = next((source for source in sources if source.corpus not in held), None)
    if empty is not None:
        thinned = f", or too few for its weight of {empty.weight:g}" if empty.weight < 1 else ""
        raise PlanError(f"source '{empty.corpus}': {empty.path} holds no rows{thinned}")


class _Counted:
    """The first `limit` of `extents`, counted as they pass."""

    def __init__(self, extents: Iterator[Extent], limit: int | None) -> None:
        self._extents = islice(extents, limit)
        self.count = 0

    def __iter__(self) -> Iterator[Extent]:
        for extent in self._extents:
            self.count += 1
            yield extent


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path, value
        return
    for name, part in items:
        yield from _flatten(part, f"{path}.{name}" if path else str(name))
