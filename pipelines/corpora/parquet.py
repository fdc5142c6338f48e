"""Parquet as the Hugging Face hub keeps datasets: a row's image is a struct `{bytes, path}`, its text a list of turns.

Columns: `image` or `images` (structs, bytes or paths; a row may have one image), `conversations` (ShareGPT's or LLaVA's
turns) or `messages` (chat messages), and `id`, `question_types` where there are such. Where the struct has no bytes,
its path is one below the image root. The others are not read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.corpora import messages, sharegpt
from pipelines.corpora.spans import Extent, Span
from pipelines.records import FileFormatError, Record, Row, RowError

_COLUMNS = ("id", "image", "images", "conversations", "messages", "system", "question_types")
_BATCH_ROWS = 32  # with their images


def scan(path: str) -> Iterator[Extent]:
    """The rows of the file `path`, by number; only its footer is read."""
    with storage.open_file(path) as file:
        num_rows = _open(file, path).metadata.num_rows
    return (Extent(row, row + 1, row + 1) for row in range(num_rows))


def read(path: str, span: Span) -> Iterator[Row]:
    """The rows of `span`, in order, out of the row groups that hold them; a bad one carries a RowError."""
    with storage.open_file(path) as file:
        table = _open(file, path)
        columns = [name for name in table.schema_arrow.names if name in _COLUMNS]
        groups: list[int] = []
        first = start = 0
        for number in range(table.num_row_groups):
            stop = start + table.metadata.row_group(number).num_rows
            if start < span.stop and stop > span.start:
                first = first if groups else start
                groups.append(number)
            start = stop
        try:
            for batch in table.iter_batches(_BATCH_ROWS, groups, columns):
                for row in range(max(span.start - first, 0), min(span.stop - first, batch.num_rows)):
                    yield Row(first + row, f"{path} (row {first + row})", _content(batch, row))
                first += batch.num_rows
                if first >= span.stop:
                    break
        except pa.ArrowException as error:
            raise FileFormatError(f"{path}: near row {first}: {error}") from error


def _open(file: Any, path: str) -> pq.ParquetFile:
    try:
        # Buffered: columns of images are read page by page, not whole row groups at a time.
        table = pq.ParquetFile(file, buffer_size=2**20)
    except pa.ArrowException as error:
        raise FileFormatError(f"{path}: no Parquet file: {error}") from error
    names = set(table.schema_arrow.names)
    if len(names & {"conversations", "messages"}) != 1:
        raise FileFormatError(
            f"{path}: has the columns {', '.join(sorted(names))}; one of conversations and messages must be there"
        )
    return table


def _content(batch: pa.RecordBatch, row: int) -> Record | RowError:
    try:
        [value] = batch.slice(row, 1).to_pylist()
        for field in ("image", "images"):
            held = value.get(field)
            value[field] = [_image(each) for each in held] if isinstance(held, list) else _image(held)
        return messages.record(value) if "messages" in value else sharegpt.record(value)
    except UnicodeDecodeError as error:
        return RowError("row_malformed", f"not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}")
    except RowError as error:
        return error


def _image(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return value.get("path") if value.get("bytes") is None else value["bytes"]
