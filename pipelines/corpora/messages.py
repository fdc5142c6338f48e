"""Chat messages as OpenAI and Hugging Face write them, `{"messages": [{"role", "content"}]}`, in JSON or JSON lines.

`content` is text, or a list of typed parts. An image is one of these:

    {"type": "image_url", "image_url": {"url": "data:image/png;base64,..."}}      OpenAI's
    {"type": "image", "image": "a/1.jpg"}                                         Hugging Face's; also "url", "path"
    {"type": "image"}                    with the path in the row's own field, `image` or `images`
    "<image>" in content that is text    likewise

A row in which an answer has OpenAI's `weight` 0 or a turn has `tool_calls` is quarantined: neither would be heeded.

An address is a path below the image root, or a data URI, which is the image itself. Others (http://, file://) are
quarantined as `path_not_allowed`: nothing is fetched. Texts of one message are joined by line ends, as in serving.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipelines.corpora import fields, json_rows
from pipelines.corpora.spans import Extent, Span
from pipelines.records import Record, Row, RowError

_ROLES = {role: role for role in ("user", "assistant", "system")}
_IN_ROW = object()  # an image part that leaves the address to the row


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
    _check_turns(row["messages"], own_id)
    beside = fields.images(row, own_id)
    if all(isinstance(content, str) for _, content in turns):
        image = fields.one_image([_loaded(value, own_id) for value in beside], own_id)
        messages = fields.plain_messages(turns, own_id, "content")
        return fields.record(row, own_id, fields.without_marker(messages, image is not None, own_id), image)
    contents = [(role, *_parts(role, content, number, own_id)) for number, (role, content) in enumerate(turns)]
    messages = fields.plain_messages([(role, text) for role, text, _ in contents], own_id, "content")
    image = fields.one_image(_placed([(role, found) for role, _, found in contents], beside, own_id), own_id)
    return fields.record(row, own_id, messages, image)


def _check_turns(turns: list[dict[str, Any]], own_id: str) -> None:
    """Raise RowError where a turn says what would be lost: that it is not learned, or that it calls a tool."""
    for number, turn in enumerate(turns):
        if turn.get("weight") == 0 and turn["role"] == "assistant":
            detail = f"turn {number} has weight 0, but every answer of a row is learned"
            raise RowError("row_malformed", detail, own_id)
        if turn.get("tool_calls"):
            raise RowError("row_malformed", f"turn {number} has tool_calls; FlashSloth answers in text alone", own_id)


def _parts(role: str, content: Any, number: int, own_id: str) -> tuple[str, list[Any]]:
    """The text of a message, and the addresses of its images."""
    if isinstance(content, str):
        markers = content.count(fields.IMAGE_MARKER) if role == "user" else 0
        return content.replace(fields.IMAGE_MARKER, "").strip() if markers else content, [_IN_ROW] * markers
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        found = fields.kind(content)
        raise RowError("row_malformed", f"turn {number}: 'content' is text or a list of parts, this is {found}", own_id)
    texts, images = [], []
    for part in content:
        if part.get("type") == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif part.get("type") == "image_url":
            url = part.get("image_url")
            images.append(url.get("url") if isinstance(url, dict) else url)
        elif part.get("type") == "image":
            named = (part[name] for name in ("image", "url", "path") if part.get(name) not in (None, ""))
            images.append(next(named, _IN_ROW))
        else:
            detail = f"turn {number}: a part of type {part.get('type')!r}; text, image and image_url are understood"
            raise RowError("row_malformed", detail, own_id)
    return "\n".join(texts), images


def _placed(found: list[tuple[str, list[Any]]], beside: list[Any], own_id: str) -> list[str | bytes]:
    """The images that the parts of all messages name, those of the row itself (`beside`) put where they belong."""
    images = [image for _, images in found for image in images]
    if images.count(_IN_ROW) != len(beside):
        detail = f"{images.count(_IN_ROW)} image parts without an address for {len(beside)} image(s)"
        raise RowError("image_marker_mismatch", detail, own_id)
    first = next((number for number, (role, _) in enumerate(found) if role == "user"), None)
    stray = next((number for number, (_, images) in enumerate(found) if images and number != first), None)
    if stray is not None and len(images) == 1:
        raise RowError("image_marker_misplaced", f"the image stands in turn {stray}, not in the first question", own_id)
    rest = iter(beside)
    return [_loaded(next(rest) if image is _IN_ROW else image, own_id) for image in images]


def _loaded(address: Any, own_id: str) -> Any:
    """The bytes of a data URI; every other address as it is."""
    # Here, since what plans a run imports this module too, and needs none of the model's libraries.
    from flashsloth.image_processing_flashsloth import ImageError, is_data_uri, read_data_uri

    try:
        return read_data_uri(address) if isinstance(address, str) and is_data_uri(address) else address
    except ImageError as error:
        raise RowError(error.reason, error.detail, own_id) from error
