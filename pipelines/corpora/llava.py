"""LLaVA's format: `{"id", "image"?, "conversations": [{"from", "value"}]}`, in a JSON array or in JSON lines.

It is the format of LLaVA-Pretrain 558k and of the LLaVA-1.5 mix 665k (github.com/haotian-liu/LLaVA). A row's image is a
path below the corpus's image root; its place in the text is a marker, `<image>`. LLaVA's own loader takes the marker
out of wherever it stands in the turn and puts the image before that turn's text; so do we, and the text is left bare.

`question_types` is ours: one kind of question per user turn, carried along for evaluation by type.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pipelines.corpora import json_rows
from pipelines.corpora.spans import Extent, Span
from pipelines.records import Message, Record, Row, RowError

IMAGE_MARKER = "<image>"
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def scan(path: str) -> Iterator[Extent]:
    """Where each row of the file `path` lies."""
    return json_rows.scan(path)


def read(path: str, span: Span) -> Iterator[Row]:
    """The rows of `span`, in order; a row that is none of this format carries a RowError."""
    for position, (location, value) in enumerate(json_rows.read_rows(path, span), start=span.first_row):
        try:
            content = _record(value)
        except RowError as error:
            content = error
        yield Row(position, location, content)


def _record(row: Any) -> Record | RowError:
    if isinstance(row, RowError):
        return row
    if not isinstance(row, dict):
        raise RowError("row_malformed", f"a row is an object, this is {_kind(row)}")
    own_id = row.get("id", "")
    if isinstance(own_id, bool) or not isinstance(own_id, str | int):
        raise RowError("row_malformed", f"'id' is text or a number, this is {_kind(own_id)}")
    own_id = _text(str(own_id), "id", "")
    image = _image(row.get("image"), own_id)
    messages = _messages(row.get("conversations"), own_id)
    types = row.get("question_types", [])
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
        raise RowError("row_malformed", "'question_types' is a list of texts", own_id)
    num_questions = sum(message["role"] == "user" for message in messages)
    if types and len(types) != num_questions:
        raise RowError("row_malformed", f"{len(types)} question_types for {num_questions} user turns", own_id)
    types = [_text(kind, "question_types", own_id) for kind in types]
    return Record(_without_marker(messages, image is not None, own_id), own_id, image, types)


def _image(value: Any, own_id: str) -> str | None:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or (isinstance(value, str) and value):
        return None if value is None else _text(value, "image", own_id)
    if isinstance(value, list) and len(value) > 1:
        raise RowError("too_many_images", f"{len(value)} images in a row; FlashSloth looks at one", own_id)
    raise RowError("row_malformed", f"'image' is a path, this is {_kind(value)}", own_id)


def _messages(turns: Any, own_id: str) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise RowError("row_malformed", f"'conversations' is a list of turns, this is {_kind(turns)}", own_id)
    messages = []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise RowError("row_malformed", f"turn {number} is an object, this is {_kind(turn)}", own_id)
        role, value = turn.get("from"), turn.get("value")
        if not isinstance(role, str) or role not in _ROLES:
            raise RowError("row_malformed", f"turn {number} is from {role!r}; known: {', '.join(_ROLES)}", own_id)
        if not isinstance(value, str):
            raise RowError("row_malformed", f"turn {number}: 'value' is text, this is {_kind(value)}", own_id)
        messages.append(Message(role=_ROLES[role], content=_text(value, f"turn {number}", own_id)))
    return messages


def _without_marker(messages: list[Message], has_image: bool, own_id: str) -> list[Message]:
    """`messages` without the marker, which must stand once in the first question, or nowhere if there is no image.

    Only questions are looked at: an answer that spells the marker is text.
    """
    marked = [i for i, message in enumerate(messages) if message["role"] == "user"]
    counts = [messages[i]["content"].count(IMAGE_MARKER) for i in marked]
    if sum(counts) != int(has_image):
        raise RowError("image_marker_mismatch", f"{sum(counts)} {IMAGE_MARKER} for {int(has_image)} image(s)", own_id)
    if not has_image:
        return messages
    if counts[0] != 1:
        turn = counts.index(1) + 1
        raise RowError("image_marker_misplaced", f"{IMAGE_MARKER} stands in question {turn}, not in the first", own_id)
    content = messages[marked[0]]["content"].replace(IMAGE_MARKER, "").strip()
    return [Message(role="user", content=content) if i == marked[0] else m for i, m in enumerate(messages)]


def _text(value: str, field: str, own_id: str) -> str:
    if "\0" in value:
        raise RowError("row_malformed", f"'{field}' contains a NUL character", own_id)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("row_malformed", f"'{field}' contains half of a surrogate pair", own_id) from error
    return value


def _kind(value: Any) -> str:
    if value is None:
        return "missing or null"
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number"}
    return ("an empty " if value in ("", []) else "") + names[type(value)].removeprefix(
        "a " if value in ("", []) else ""
    )
