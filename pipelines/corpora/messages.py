"""Chat messages as OpenAI and Hugging Face write them, `{"messages": [{"role", "content"}]}`, in JSON or JSON lines.

`content` is text, or a list of typed parts. An image is one of these:

    {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}      OpenAI's
    {"type": "image", "image": "a/1.jpg"}                                         Hugging Face's; also "url", "path"
    {"type": "image"}                    with the path in the row's own field, `image` or `images`
    "<image>" in content that is text    likewise

A typed text of a question that begins or ends with `<image>` repeats an image part beside it; unless there are as many
of one as of the other, the row is quarantined. So is one in which an answer has OpenAI's `weight` 0 or a turn calls a
tool: neither would be heeded.

An address is a path below the image root, or a data URI, which is the image itself. Others (http://, file://) are
quarantined as `path_not_allowed`: nothing is fetched. Texts of one message are joined by line ends, as in serving.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipelines.corpora import fields, json_rows, typed_content
from pipelines.corpora.spans import Extent, Span
from pipelines.records import Record, Row

_ROLES = {role: role for role in ("user", "assistant", "system")}


def scan(path: str) -> Iterator[Extent]:
    """Where each row of the file `path` lies."""
    return json_rows.scan(path)


def read(path: str, span: Span) -> Iterator[Row]:
    """The rows of `span`, in order; a row that is none of this format carries a RowError."""
    return json_rows.read(path, span, record)


def record(row: Any) -> Record:
    """The record of a row as JSON holds it.

    Raises:
        RowError: row_malformed, media_not_supported, too_many_images, image_marker_mismatch, image_marker_misplaced,
            image_undecodable.
    """
    own_id = fields.own_id(row)
    turns = fields.turns(row.get("messages"), own_id, "messages", ("role", "content"), _ROLES)
    beside = fields.images(row, own_id)
    if all(isinstance(content, str) for _, content in turns):
        image = fields.one_image([typed_content.loaded(value, own_id) for value in beside], own_id)
        messages = fields.plain_messages(turns, own_id, "content")
        return fields.record(row, own_id, fields.without_marker(messages, image is not None, own_id), image)
    contents = [
        (role, *typed_content.parts(role, content, number, own_id)) for number, (role, content) in enumerate(turns)
    ]
    messages = fields.plain_messages([(role, text) for role, text, _ in contents], own_id, "content")
    image = fields.one_image(
        typed_content.placed([(role, found) for role, _, found in contents], beside, own_id), own_id
    )
    return fields.record(row, own_id, messages, image)
