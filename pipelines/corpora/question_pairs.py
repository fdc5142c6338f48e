"""Questions about one image as pairs, `{"texts": [{"user", "assistant"}]}`: the turns of one conversation.

So have the Cauldron, FineVision and Docmatix them, in Parquet. The image stands before the first question.
"""

from __future__ import annotations

from typing import Any

from pipelines.corpora import fields
from pipelines.records import Message, Record, RowError


def record(row: dict[str, Any]) -> Record:
    """The record of a row. Questions need not have the marker for the image; where one has, LLaVA's rules hold.

    Raises:
        RowError: row_malformed, media_not_supported, too_many_images, image_marker_mismatch, image_marker_misplaced.
    """
    own_id = fields.own_id(row)
    pairs = row.get("texts")
    if not isinstance(pairs, list) or not pairs:
        raise RowError("row_malformed", f"'texts' is a list of pairs, this is {fields.kind(pairs)}", own_id)
    messages = [message for number, pair in enumerate(pairs) for message in _pair(pair, number, own_id)]
    image = fields.one_image(fields.images(row, own_id), own_id)
    if any(fields.IMAGE_MARKER in message["content"] for message in messages if message["role"] == "user"):
        messages = fields.without_marker(messages, image is not None, own_id)
    return fields.record(row, own_id, messages, image)


def _pair(pair: Any, number: int, own_id: str) -> list[Message]:
    if not isinstance(pair, dict):
        raise RowError("row_malformed", f"pair {number} is an object, this is {fields.kind(pair)}", own_id)
    for role in ("user", "assistant"):
        if not isinstance(pair.get(role), str):
            detail = f"pair {number}: '{role}' is text, this is {fields.kind(pair.get(role))}"
            raise RowError("row_malformed", detail, own_id)
    return [
        Message(role=role, content=fields.text(pair[role], f"pair {number}", own_id)) for role in ("user", "assistant")
    ]
