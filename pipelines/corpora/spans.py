"""A span: a run of rows in a file that a worker can read without reading what comes before it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """A run of rows, of which the first is number `first_row` (from 0) and lies on line `first_line` (from 1).

    The file's format knows what `start` and `stop` mean: offsets of bytes in JSON and tar, numbers of rows elsewhere.
    """

    start: int
    stop: int
    first_row: int
    rows: int
    """How many of its rows are taken; all of them, unless a source is thinned out."""
    first_line: int


@dataclass(frozen=True)
class Extent:
    """Where one row lies, in the terms of its format (see Span), and its first line."""

    start: int
    stop: int
    line: int


def group(extents: Iterable[Extent], rows: int, takes: Callable[[int], bool] | None = None) -> Iterator[Span]:
    """Runs of `rows` rows (the last may be shorter) out of all extents of a file.

    Args:
        extents: of the file's rows, in order.
        rows: to a run.
        takes: whether the row with this number counts; the others may lie inside a run, but never begin or end it.
    """
    first: tuple[int, Extent] | None = None
    last: Extent | None = None
    count = 0
    for position, extent in enumerate(extents):
        if takes and not takes(position):
            continue
        first, last = first or (position, extent), extent
        count += 1
        if count == rows:
            yield Span(first[1].start, last.stop, first[0], count, first[1].line)
            first, count = None, 0
    if first is not None and last is not None:
        yield Span(first[1].start, last.stop, first[0], count, first[1].line)
