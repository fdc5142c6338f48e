"""Fields that formats share: the corpus's own id, the image, turns of a conversation, the marker for the image.

Each function takes a row as its format has parsed it, of whatever types, and raises RowError for what it cannot be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pipelines.corpora import image_names
from pipelines.records import Message, Record, RowError

IMAGE_MARKER = "<image>"
_OTHER_MEDIA = ("video", "videos", "audio", "audios")
MEDIA = ("image", "images", *_OTHER_MEDIA)
"""Fields of a row that hold what is no text."""
CONVERSATIONS = ("conversations", "messages", "texts")
"""Fields of a row that hold turns, of which one alone is read."""
_TEXTS = {"id", "messages", "conversations", "question", "answer", "texts", "captions", "system", "question_types"}
"""Fields that are read as text: what in them looks like the name of an image is a part of what is said."""


def own_id(row: Any) -> str:
    """The corpus's own id of `row`, empty where it has none."""
    if not isinstance(row, dict):
        raise RowError("row_malformed", f"a row is an object, this is {kind(row)}")
    value = row.get("id")
    if value is None:
        value = ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # which pandas spells 1.0 in a column where some are missing
    if isinstance(value, bool) or not isinstance(value, str | int):
        found = value if isinstance(value, float) else kind(value)
        raise RowError("row_malformed", f"'id' is text or a whole number, this is {found}")
    return text(str(value), "id", "")


def images(row: dict[str, Any], own_id: str) -> list[Any]:
    """What the fields `image` and `images` hold: nothing, one value, or a list of them. An empty one is as if absent.

    Raises:
        RowError: row_malformed: there are both; media_not_supported: the row is about a video or a sound.
    """
    for field in _OTHER_MEDIA:
        held = row.get(field)
        if any(held.values()) if isinstance(held, dict) else held:
            raise RowError("media_not_supported", f"the row has '{field}'; FlashSloth looks at an image", own_id)
    values = [row[field] for field in ("image", "images") if row.get(field) not in (None, "", [])]
    if len(values) > 1:
        raise RowError("row_malformed", "a row has 'image' or 'images', not both", own_id)
    if not values:
        return []
    return values[0] if isinstance(values[0], list) else values


def one_image(values: list[Any], own_id: str) -> str | bytes | None:
    """The path, or the encoded bytes, of a row's only image; None where there is none."""
    if not values:
        return None
    if len(values) > 1:
        raise RowError("too_many_images", f"{len(values)} images in a row; FlashSloth looks at one", own_id)
    if isinstance(values[0], bytes):
        return values[0]
    if not isinstance(values[0], str) or not values[0]:
        raise RowError("row_malformed", f"'image' is a path, this is {kind(values[0])}", own_id)
    return text(values[0], "image", own_id)


def turns(
    values: Any, own_id: str, field: str, names: tuple[str, str], roles: Mapping[str, str]
) -> list[tuple[str, Any]]:
    """(role, content) of each turn in the list `values`, content of whatever type.

    Args:
        values: what the row holds in `field`.
        own_id: of the row.
        field: its name, for messages.
        names: of a turn's two fields: who speaks, and what.
        roles: the format's name of a speaker -> ours.
    """
    if not isinstance(values, list) or not values:
        raise RowError("row_malformed", f"'{field}' is a list of turns, this is {kind(values)}", own_id)
    found = []
    for number, turn in enumerate(values):
        if not isinstance(turn, dict):
            raise RowError("row_malformed", f"turn {number} is an object, this is {kind(turn)}", own_id)
        role = turn.get(names[0])
        if role is None:
            detail = f"turn {number} has no '{names[0]}'; it has: {', '.join(map(repr, turn))}"
            raise RowError("row_malformed", detail, own_id)
        if not isinstance(role, str) or role not in roles:
            raise RowError("row_malformed", f"turn {number} is from {role!r}; known: {', '.join(roles)}", own_id)
        _check_heeded(turn, names, roles[role], number, own_id)
        found.append((roles[role], turn.get(names[1])))
    return found


def _check_heeded(turn: Mapping[str, Any], names: tuple[str, str], role: str, number: int, own_id: str) -> None:
    """Raise RowError where a turn says what would be lost: that it is not learned, calls a tool, shows an image."""
    if turn.get("weight") == 0 and role == "assistant":
        raise RowError("row_malformed", f"turn {number} has weight 0, but every answer of a row is learned", own_id)
    call = next((field for field in ("tool_calls", "function_call") if turn.get(field)), None)
    if call:
        raise RowError("row_malformed", f"turn {number} has {call}; FlashSloth answers in text alone", own_id)
    field = _image_field({name: value for name, value in turn.items() if name not in names})
    if field is not None:
        detail = f"turn {number} has {field!r}, where no image is looked for: name it in the row's own 'image'"
        raise RowError("row_malformed", detail, own_id)


def plain_messages(turns: list[tuple[str, Any]], own_id: str, name: str) -> list[Message]:
    """Messages out of turns whose content, in the field `name`, is text."""
    messages = []
    for number, (role, value) in enumerate(turns):
        if not isinstance(value, str):
            raise RowError("row_malformed", f"turn {number}: '{name}' is text, this is {kind(value)}", own_id)
        messages.append(Message(role=role, content=text(value, f"turn {number}", own_id)))
    return messages


def record(row: dict[str, Any], own_id: str, messages: list[Message], image: str | bytes | None) -> Record:
    """A record with the `question_types` of `row`, a list with one text per user turn or nothing, and its `system`.

    A model has one system text, its processor's: a row that brings another is quarantined as `role_order`. So is, as
    row_malformed, one that offers tools, which an answer would have to know of, one with two conversations, and one
    without an image whose other fields seem to name one.
    """
    if image is None:
        _check_no_image(row, own_id)
    if row.get("tools") not in (None, "", "[]", []):
        raise RowError("row_malformed", "the row has tools; FlashSloth answers in text alone", own_id)
    talks = [name for name in CONVERSATIONS if _is_talk(row.get(name))]
    if len(talks) > 1:
        detail = f"the row has {' and '.join(talks)}, of which one would be lost; drop one"
        raise RowError("row_malformed", detail, own_id)
    types = row.get("question_types") or []
    if not isinstance(types, list) or not all(isinstance(kind, str) for kind in types):
        raise RowError("row_malformed", "'question_types' is a list of texts", own_id)
    num_questions = sum(message["role"] == "user" for message in messages)
    if types and len(types) != num_questions:
        raise RowError("row_malformed", f"{len(types)} question_types for {num_questions} user turns", own_id)
    return Record(
        [*_system(row.get("system"), own_id), *messages],
        own_id,
        image,
        [text(kind, "question_types", own_id) for kind in types],
    )


def _is_talk(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(turn, dict) for turn in value)


def _check_no_image(row: Mapping[str, Any], own_id: str) -> None:
    field = _image_field({name: value for name, value in row.items() if name not in {*MEDIA, *_TEXTS}})
    if field is not None:
        detail = (
            f"the row has {field!r} and no 'image', which alone is read: rename it, or drop it where it is no image"
        )
        raise RowError("row_malformed", detail, own_id)


def _image_field(fields: Mapping[str, Any]) -> str | None:
    """The first of `fields` that is an image or names one, by what it is called or by what it holds."""
    for name, value in fields.items():
        if image_names.seems_image(name) and any(text.strip() for text in _texts(value)):
            return name
        if any(map(image_names.names_image, _texts(value))):
            return name
    return None


def _texts(value: Any) -> Iterator[str]:
    """The texts in `value`, however deep they lie."""
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            yield part
        elif isinstance(part, dict | list):
            waiting += part.values() if isinstance(part, dict) else part


def _system(value: Any, own_id: str) -> list[Message]:
    if value in (None, ""):
        return []
    if not isinstance(value, str):
        raise RowError("row_malformed", f"'system' is text, this is {kind(value)}", own_id)
    return [Message(role="system", content=text(value, "system", own_id))]


def without_marker(messages: list[Message], has_image: bool, own_id: str) -> list[Message]:
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


def text(value: str, field: str, own_id: str) -> str:
    """`value`, which must be text that can be stored: without NUL and without halves of surrogate pairs."""
    if "\0" in value:
        raise RowError("row_malformed", f"'{field}' contains a NUL character", own_id)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError("row_malformed", f"'{field}' contains half of a surrogate pair", own_id) from error
    return value


def kind(value: Any) -> str:
    """What `value` is, for a person."""
    if value is None:
        return "missing or null"
    if value in ("", []):
        return "an empty text" if value == "" else "an empty list"
    names = {dict: "an object", list: "a list", str: "text", bool: "a truth value", int: "a number", float: "a number"}
    return names.get(type(value), f"a {type(value).__name__}")
