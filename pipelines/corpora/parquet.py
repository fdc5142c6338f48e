"""Parquet as the Hugging Face hub keeps datasets: a row's image is a struct `{bytes, path}`, its text a list of turns.

Columns: `image` or `images` (structs, bytes or paths; a row may have one image), and of these the first that is there:

    conversations      ShareGPT's or LLaVA's turns, or those of chat messages
    messages           chat messages, whose typed content may hold the struct
    texts              pairs of `user` and `assistant`, as the Cauldron and FineVision have them
    question           and maybe `answer`
    caption or text    about the image

Turns may be a struct of lists. `id`, `system`, `tools` and `question_types` are read where there are such. Where a
struct has no bytes, its path is one below the image root; a struct with neither is an image that got lost, no struct a
row without one. A row with a `video` or an `audio` is refused. The other columns are not read; a file with images in
one of them is refused, as is one with `image_url`, `img`, a struct of bytes or the like in place of `image` and of what
messages hold. Images without any of the columns of text are there to be annotated: nothing can be learned from them.
Beside other columns that seem to tell of them (`prompt`, lists of turns) the file is refused.

A row can be had only by decoding its row group from the beginning. So a chunk costs least where row groups are not much
larger than it: the hub's have 100 rows where there are images, 1000 otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import storage
from pipelines.corpora import (
    captions,
    fields,
    image_structs,
    messages,
    parquet_columns,
    question_pairs,
    questions,
    row_groups,
    sharegpt,
    turn_columns,
)
from pipelines.corpora.spans import Extent, Span
from pipelines.records import Record, Row, RowError

_TEXTS: dict[str, Callable[[Any], Record]] = {
    "conversations": sharegpt.record,
    "messages": messages.record,
    "texts": question_pairs.record,
    "question": questions.record,
    **{field: partial(captions.record, field=field) for field in parquet_columns.CAPTIONS},
}
_BATCH_ROWS = 32  # with their images


def scan(path: str) -> Iterator[Extent]:
    """The rows of the file `path`, by number; only its footer is read."""
    with storage.open_file(path) as file:
        metadata = _open(file, path).metadata
    return row_groups.extents(metadata, parquet_columns.READ)


def read(path: str, span: Span) -> Iterator[Row]:
    """The rows of `span`, in order, out of the row groups that hold them; a bad one carries a RowError."""
    with storage.open_file(path) as file, row_groups.naming(f"{path}: rows {span.start} to {span.stop}"):
        table = _open(file, path)
        columns = [name for name in table.schema_arrow.names if name in parquet_columns.READ]
        groups, first = row_groups.holding(table.metadata, span, path)
        for batch in table.iter_batches(_BATCH_ROWS, groups, columns):
            for row in range(max(span.start - first, 0), min(span.stop - first, batch.num_rows)):
                yield Row(first + row, f"{path} (row {first + row})", _content(batch, row))
            first += batch.num_rows
            if first >= span.stop:
                break


def _open(file: Any, path: str) -> pq.ParquetFile:
    table = row_groups.open_table(file, path, parquet_columns.READ)
    parquet_columns.check(table.schema_arrow, path)
    return table


def _content(batch: pa.RecordBatch, row: int) -> Record | RowError:
    try:
        [value] = batch.slice(row, 1).to_pylist()
        own_id = fields.own_id(value)
        turn_columns.replace(value, own_id)
        image_structs.replace(value, own_id)
        return next((record for field, record in _TEXTS.items() if field in value), _image_alone)(value)
    except UnicodeDecodeError as error:
        return RowError("row_malformed", f"not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}")
    except RowError as error:
        return error


def _image_alone(row: dict[str, Any]) -> Record:
    own_id = fields.own_id(row)
    return Record([], own_id, fields.one_image(fields.images(row, own_id), own_id))
