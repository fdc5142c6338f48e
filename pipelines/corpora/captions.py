"""Captions: a text about an image. It becomes an answer to an empty question, which the caption layout throws away."""

from __future__ import annotations

from typing import Any

from pipelines.corpora import fields
from pipelines.records import Message, Record, RowError


def turns(caption: str, own_id: str) -> list[Message]:
    """The conversation that `caption` becomes."""
    answer = fields.text(caption.strip(), "caption", own_id)
    return [Message(role="user", content=""), Message(role="assistant", content=answer)]


def record(row: dict[str, Any], field: str) -> Record:
    """The record of a row with an image and a caption in `field`; where that is null, the image is to be annotated.

    Raises:
        RowError: row_malformed, media_not_supported, too_many_images; image_missing: there is nothing to describe.
    """
    own_id = fields.own_id(row)
    image = fields.one_image(fields.images(row, own_id), own_id)
    if image is None:
        raise RowError("image_missing", f"the row has '{field}', and no image that it could be about", own_id)
    caption = row.get(field)
    if caption is not None and not isinstance(caption, str):
        raise RowError("row_malformed", f"'{field}' is text, this is {fields.kind(caption)}", own_id)
    return fields.record(row, own_id, [] if caption is None else turns(caption, own_id), image)
