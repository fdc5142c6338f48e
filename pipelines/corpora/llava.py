"""LLaVA's format: `{"id", "image"?, "conversations": [{"from", "value"}]}`, in a JSON array or in JSON lines.

It is the format of LLaVA-Pretrain 558k and of the LLaVA-1.5 mix 665k (github.com/haotian-liu/LLaVA). A row's image is a
path below the corpus's image root; its place in the text is a marker, `<image>`. LLaVA's own loader takes the marker
out of wherever it stands in the turn and puts the image before that turn's text; so do we, and the text is left bare.

`question_types` is ours: one kind of question per user turn, carried along for evaluation by type.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipelines.corpora import fields, json_rows
from pipelines.corpora.spans import Extent, Span
from pipelines.records import Record, Row

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


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
    messages = fields.plain_messages(turns, own_id, "value")
    return fields.record(row, own_id, fields.without_marker(messages, image is not None, own_id), image)
