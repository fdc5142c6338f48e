"""Questions as VQA sets keep them: `{"id"?, "image"?, "question", "answer"?}`, in JSON or JSON lines.

A row without an answer is there to be annotated. A question need not have the marker `<image>`; where it has one, the
row has an image, and the marker is taken out as in LLaVA's format. Parquet with a column `question` is read by the same
rules.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipelines.corpora import fields, json_rows
from pipelines.corpora.spans import Extent, Span
from pipelines.records import Message, Record, Row, RowError


def scan(path: str) -> Iterator[Extent]:
    """Where each row of the file `path` lies."""
    return json_rows.scan(path)


def read(path: str, span: Span) -> Iterator[Row]:
    """The rows of `span`, in order; a row that is none of this format carries a RowError."""
    return json_rows.read(path, span, record)


def record(row: Any) -> Record:
    """The record of a row as JSON holds it.

    Raises:
        RowError: row_malformed, media_not_supported, too_many_images, image_marker_mismatch.
    """
    own_id = fields.own_id(row)
    messages = []
    for role, field in (("user", "question"), ("assistant", "answer")):
        value = row.get(field)
        if value is None and field == "answer":
            continue
        if not isinstance(value, str):
            raise RowError("row_malformed", f"'{field}' is text, this is {fields.kind(value)}", own_id)
        messages.append(Message(role=role, content=fields.text(value, field, own_id)))
    image = fields.one_image(fields.images(row, own_id), own_id)
    if fields.IMAGE_MARKER in messages[0]["content"]:
        messages = fields.without_marker(messages, image is not None, own_id)
    return fields.record(row, own_id, messages, image)
