"""Parquet files and their row groups, whatever the columns mean."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpora.spans import Extent, Span
from pipelines.records import FileFormatError


def open_table(file: Any, path: str, read: Collection[str]) -> pq.ParquetFile:
    """The Parquet file that lies at `path`, of which the columns `read` will be read, where it has them.

    Raises:
        FileFormatError: it is none, or has one of them twice.
    """
    with naming(f"{path}: no Parquet file"):
        # Buffered: columns of images are read page by page, not whole row groups at a time.
        table = pq.ParquetFile(file, buffer_size=2**20)
    twice = next((name for name in read if table.schema_arrow.names.count(name) > 1), None)
    if twice is not None:
        raise FileFormatError(f"{path}: has two columns {twice!r}, of which one would be lost; rename one")
    return table


def extents(metadata: pq.FileMetaData, read: Collection[str]) -> Iterator[Extent]:
    """The rows, by number. Each has the bytes, by the mean of its row group, of the columns `read`."""
    row = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        size = _size(group, read) // max(1, group.num_rows)
        for _ in range(group.num_rows):
            yield Extent(row, row + 1, row + 1, size)
            row += 1


def holding(metadata: pq.FileMetaData, span: Span, path: str) -> tuple[list[int], int]:
    """The row groups that hold `span`, and the number of the first row in them.

    Raises:
        FileFormatError: the file, which lies at `path`, has no row of `span`.
    """
    starts = [0, *accumulate(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))]
    held = [n for n, (start, stop) in enumerate(pairwise(starts)) if start < span.stop and stop > span.start]
    if not held:
        raise FileFormatError(f"{path}: has {starts[-1]} rows, and none from {span.start} on")
    return held, starts[held[0]]


@contextmanager
def naming(what: str) -> Iterator[None]:
    """Raise what Arrow finds wrong as a FileFormatError that begins with `what`."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk or the store; Arrow's own have no number
        raise FileFormatError(f"{what}: {error}") from error


def _size(group: pq.RowGroupMetaData, read: Collection[str]) -> int:
    """Bytes of the columns `read` of `group`; values that repeat, of which it keeps one, count once."""
    columns = map(group.column, range(group.num_columns))
    return sum(each.total_uncompressed_size for each in columns if each.path_in_schema.split(".")[0] in read)
