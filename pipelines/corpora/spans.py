"""A span: a run of rows in a file that a worker can read without reading what comes before it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """`rows` rows, of which the first is number `first_row` (from 0) and lies on line `first_line` (from 1).

    They lie in the bytes `start` to `stop` of the file.
    """

    start: int
    stop: int
    first_row: int
    rows: int
    first_line: int


@dataclass(frozen=True)
class Extent:
    """Where one row lies: its bytes in the file and its first line."""

    start: int
    stop: int
    line: int


def group(extents: Iterable[Extent], rows: int, limit: int | None = None) -> Iterator[Span]:
    """Runs of `rows` rows (the last may be shorter) out of all extents of a file, of the first `limit` at most."""
    first: Extent | None = None
    last: Extent | None = None
    taken = count = 0
    for extent in extents:
        if limit is not None and taken == limit:
            break
        first, last = first or extent, extent
        taken, count = taken + 1, count + 1
        if count == rows:
            yield Span(first.start, last.stop, taken - count, count, first.line)
            first, count = None, 0
    if first is not None and last is not None:
        yield Span(first.start, last.stop, taken - count, count, first.line)
