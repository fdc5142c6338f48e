"""Chunks: files of corpora, cut into runs of rows that are planned, made, committed and resumed as one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby, islice

from pydantic import BaseModel, ConfigDict, Field

from pipelines.corpora import FORMATS, spans
from pipelines.corpora.spans import Extent, Span
from pipelines.preparation.sources import PlanError, SourceTerms, check_unchanged, is_taken
from pipelines.records import FileFormatError, Row


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
