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


# A span is read whole, images and all. Where rows are passed over, it ends early rather than span many times as many
# rows as are taken.
_ROWS_SPANNED = 4


def group(extents: Iterable[Extent], rows: int, takes: Callable[[int], bool] | None = None) -> Iterator[Span]:
    """Runs of `rows` rows out of all extents of a file; the last may be shorter, and those that pass over many rows.

    Args:
        extents: of the file's rows, in order.
        rows: to a run.
        takes: whether the row with this number counts; the others may lie inside a run, but never begin or end it.
    """
    held: list[tuple[int, Extent]] = []  # the first and the last row of the run under way
    count = 0
    for position, extent in enumerate(extents):
        if held and (count == rows or position - held[0][0] >= _ROWS_SPANNED * rows):
            yield _span(held, count)
            held, count = [], 0
        if takes is None or takes(position):
            held, count = [*held[:1], (position, extent)], count + 1
    if held:
        yield _span(held, count)


def _span(held: list[tuple[int, Extent]], count: int) -> Span:
    (first_row, first), (_, last) = held[0], held[-1]
    return Span(first.start, last.stop, first_row, count, first.line)
