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
    size: int = 0
    """Bytes of its rows and of the images that they bring, about: what is held at once of it."""


@dataclass(frozen=True)
class Extent:
    """Where one row lies, in the terms of its format (see Span), and its first line."""

    start: int
    stop: int
    line: int
    size: int
    """Bytes of the row and of the image that it brings, about; 0 where it is no more than a name."""


# A span is read whole, images and all. Where rows are passed over, it ends early rather than span many times as many
# rows as are taken.
_ROWS_SPANNED = 4
MOST_BYTES = 200_000_000
"""Of a span, unless one row has more: images that rows bring may have megabytes each. With less, Parquet would cost
more, of which each span is decoded from the beginning of its row group."""


def group(extents: Iterable[Extent], rows: int, takes: Callable[[int], bool] | None = None) -> Iterator[Span]:
    """Runs of `rows` rows out of all extents of a file. Shorter are the last, those that the next row would bring above
    MOST_BYTES, and those that pass over many rows.

    Args:
        extents: of the file's rows, in order.
        rows: to a run.
        takes: whether the row with this number counts; the others may lie inside a run, but never begin or end it.
    """
    held: list[tuple[int, Extent]] = []  # the first and the last row of the run under way
    count = size = seen = 0  # rows taken, bytes up to the last of them, and with those that were passed over since
    for position, extent in enumerate(extents):
        seen += extent.size
        passed = position - held[0][0] if held else 0
        if held and (count == rows or passed >= _ROWS_SPANNED * rows or seen > MOST_BYTES):
            yield _span(held, count, size)
            held, count = [], 0
        if takes is None or takes(position):
            seen = seen if held else extent.size
            held, count, size = [*held[:1], (position, extent)], count + 1, seen
    if held:
        yield _span(held, count, size)


def _span(held: list[tuple[int, Extent]], count: int, size: int) -> Span:
    (first_row, first), (_, last) = held[0], held[-1]
    return Span(first.start, last.stop, first_row, count, first.line, size)
