"""Parquet as the Hugging Face hub keeps datasets: a row's image is a struct `{bytes, path}`, its text a list of turns.

Columns: `image` or `images` (structs, bytes or paths; a row may have one image), `conversations` (ShareGPT's or LLaVA's
turns) or `messages` (chat messages, whose typed content may hold the struct), or where there are neither `question` and
maybe `answer`, and `id`, `question_types` where there are such. Where a struct has no bytes, its path is one below the
image root; a struct with neither is an image that got lost, no struct a row without one. A row with a `video` or an
`audio` is refused. The other columns are not read. Images without any of the columns of text are there to be annotated:
nothing can be learned from them.

A row can be had only by decoding its row group from the beginning. So a chunk costs least where row groups are not much
larger than it: the hub's have 100 rows where there are images, 1000 otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate, pairwise
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.corpora import fields, messages, questions, sharegpt
from pipelines.corpora.spans import Extent, Span
from pipelines.records import FileFormatError, Record, Row, RowError

_TEXTS: dict[str, Callable[[Any], Record]] = {
    "conversations": sharegpt.record,
    "messages": messages.record,
    "question": questions.record,
}
_COLUMNS = ("id", *fields.MEDIA, *_TEXTS, "answer", "system", "question_types")
_BATCH_ROWS = 32  # with their images


def scan(path: str) -> Iterator[Extent]:
    """The rows of the file `path`, by number; only its footer is read."""
    with storage.open_file(path) as file:
        metadata = _open(file, path).metadata
    row = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        size = _size(group) // max(1, group.num_rows)
        for _ in range(group.num_rows):
            yield Extent(row, row + 1, row + 1, size)
            row += 1


def read(path: str, span: Span) -> Iterator[Row]:
    """The rows of `span`, in order, out of the row groups that hold them; a bad one carries a RowError."""
    with storage.open_file(path) as file, _naming(f"{path}: rows {span.start} to {span.stop}"):
        table = _open(file, path)
        columns = [name for name in table.schema_arrow.names if name in _COLUMNS]
        groups, first = _groups(table.metadata, span)
        for batch in table.iter_batches(_BATCH_ROWS, groups, columns):
            for row in range(max(span.start - first, 0), min(span.stop - first, batch.num_rows)):
                yield Row(first + row, f"{path} (row {first + row})", _content(batch, row))
            first += batch.num_rows
            if first >= span.stop:
                break


def _size(group: pq.RowGroupMetaData) -> int:
    """Bytes of the columns of `group` that are read; values that repeat, of which it keeps one, count once."""
    columns = map(group.column, range(group.num_columns))
    return sum(each.total_uncompressed_size for each in columns if each.path_in_schema.split(".")[0] in _COLUMNS)


def _groups(metadata: pq.FileMetaData, span: Span) -> tuple[list[int], int]:
    """The row groups that hold `span`, and the number of the first row in them."""
    starts = [0, *accumulate(metadata.row_group(number).num_rows for number in range(metadata.num_row_groups))]
    held = [n for n, (start, stop) in enumerate(pairwise(starts)) if start < span.stop and stop > span.start]
    return held, starts[held[0]]


def _open(file: Any, path: str) -> pq.ParquetFile:
    with _naming(f"{path}: no Parquet file"):
        # Buffered: columns of images are read page by page, not whole row groups at a time.
        table = pq.ParquetFile(file, buffer_size=2**20)
    names = set(table.schema_arrow.names)
    twice = next((name for name in _COLUMNS if table.schema_arrow.names.count(name) > 1), None)
    if twice is not None:
        raise FileFormatError(f"{path}: has two columns {twice!r}, of which one would be lost; rename one")
    if not names & {*_TEXTS, "image", "images"} or names >= {"conversations", "messages"}:
        raise FileFormatError(
            f"{path}: has the columns {', '.join(sorted(names))}; one of conversations, messages and question must be "
            "there, or image alone"
        )
    return table


@contextmanager
def _naming(what: str) -> Iterator[None]:
    try:
        yield
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # of the disk or the store; Arrow's own have no number
        raise FileFormatError(f"{what}: {error}") from error


def _content(batch: pa.RecordBatch, row: int) -> Record | RowError:
    try:
        [value] = batch.slice(row, 1).to_pylist()
        own_id = fields.own_id(value)
        for field in ("image", "images"):
            held = value.get(field)
            value[field] = [_image(each, own_id) for each in held] if isinstance(held, list) else _image(held, own_id)
        for part in _image_parts(value.get("messages")):
            part["image"] = _image(part.get("image"), own_id)
        return next((record for field, record in _TEXTS.items() if field in value), _image_alone)(value)
    except UnicodeDecodeError as error:
        return RowError("row_malformed", f"not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}")
    except RowError as error:
        return error


def _image_alone(row: dict[str, Any]) -> Record:
    own_id = fields.own_id(row)
    return Record([], own_id, fields.one_image(fields.images(row, own_id), own_id))


def _image_parts(turns: Any) -> Iterator[dict[str, Any]]:
    """The parts of typed content that are images, of whatever the row holds as chat messages."""
    for turn in turns if isinstance(turns, list) else []:
        content = turn.get("content") if isinstance(turn, dict) else None
        for part in content if isinstance(content, list) else []:
            if isinstance(part, dict) and part.get("type") == "image":
                yield part


def _image(value: Any, own_id: str) -> Any:
    if not isinstance(value, dict):
        return value
    if value.get("bytes") is not None:
        return value["bytes"]
    if not value.get("path"):
        raise RowError("image_missing", f"the image is a struct ({', '.join(value)}) without bytes and path", own_id)
    return value["path"]
