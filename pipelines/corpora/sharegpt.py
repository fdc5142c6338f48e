"""ShareGPT's format: `{"id"?, "conversations": [{"from", "value"}], "system"?, "image"? | "images"?}`, JSON or lines.

LLaVA's format comes from it; this one knows more names of speakers and a system text in a field of its own. The place
of the image is the marker `<image>`, as there. A model has one system text, its processor's: a row that brings another
is quarantined as `role_order`. So are rows that begin with an answer, which ShareGPT has where a page was cut up.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipelines.corpora import fields, json_rows
from pipelines.corpora.spans import Extent, Span
from pipelines.records import Record, Row

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "assistant"), "assistant"),
    "system": "system",
}


def scan(path: str) -> Iterator[Extent]:
    """Where each row of the file `path` lies."""
    return json_rows.scan(path)


def read(path: str, span: Span) -> Iterator[Row]:
    """The rows of `span`, in order; a row that is none of this format carries a RowError."""
    return json_rows.read(path, span, record)


def record(row: Any) -> Record:
    """The record of a row as JSON holds it.

    Raises:
        RowError: row_malformed, media_not_supported, too_many_images, image_marker_mismatch, image_marker_misplaced.
    """
    own_id = fields.own_id(row)
    image = fields.one_image(fields.images(row, own_id), own_id)
    turns = fields.turns(row.get("conversations"), own_id, "conversations", ("from", "value"), _ROLES)
    messages = fields.without_marker(fields.plain_messages(turns, own_id, "value"), image is not None, own_id)
    return fields.record(row, own_id, messages, image)
