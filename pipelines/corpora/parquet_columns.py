"""The columns of a Parquet file: which are read, and which must not be passed over in silence."""

from __future__ import annotations

import pyarrow as pa

from pipelines.corpora import fields
from pipelines.records import FileFormatError

CONVERSATIONS = ("conversations", "messages", "texts")
CAPTIONS = ("caption", "text")
_IMAGES = ("image", "images")
READ = ("id", *fields.MEDIA, *CONVERSATIONS, "question", "answer", *CAPTIONS, "system", "tools", "question_types")
"""Columns that are read where there are such."""
# Such a column says something about the image, which would be lost where nothing else is read; `label` or `url` do not.
_TELLING = (
    *("prompt", "completion", "question", "questions", "answer", "answers"),
    *("instruction", "output", "response"),
)


def check(schema: pa.Schema, path: str) -> None:
    """Raise FileFormatError unless all that the rows of the file `path` seem to say is read."""
    names = set(schema.names)
    unread = [column.name for column in schema if column.name not in READ and _holds_image(column.type)]
    if unread:
        raise FileFormatError(
            f"{path}: holds images in {', '.join(unread)}, and none but those in image or images are read: rename the "
            "column so, and drop the others"
        )
    talks = [name for name in CONVERSATIONS if name in names]
    if len(talks) > 1:
        raise FileFormatError(f"{path}: has {' and '.join(talks)}, of which one would be lost: drop one")
    if talks or "question" in names:
        return
    if not names & set(_IMAGES):
        raise FileFormatError(
            f"{path}: has the columns {', '.join(sorted(names))}; one of conversations, messages and question must be "
            "there, or texts, or an image beside caption or text, or image alone"
        )
    if names >= set(CAPTIONS):
        raise FileFormatError(f"{path}: has caption and text, of which one would be lost: drop one")
    lost = [column.name for column in schema if column.name.lower() in _TELLING or _holds_turns(column)]
    if lost:
        raise FileFormatError(
            f"{path}: has an image, and {', '.join(lost)}, which would not be read: rename to question and answer, or "
            "to conversations what holds turns; drop them for images to be annotated"
        )


def _inner(kind: pa.DataType) -> list[pa.Field]:
    return [kind.field(number) for number in range(kind.num_fields)]


def _holds_image(kind: pa.DataType) -> bool:
    """Whether `kind` is a struct of bytes and path, or has one in it."""
    inner = _inner(kind)
    return {each.name for each in inner} >= {"bytes", "path"} or any(_holds_image(each.type) for each in inner)


def _holds_text(kind: pa.DataType) -> bool:
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    return is_text or any(_holds_text(each.type) for each in _inner(kind))


def _holds_turns(column: pa.Field) -> bool:
    """Whether it is a list, not read, of structs in which two fields hold text: who speaks, and what."""
    is_list = pa.types.is_list(column.type) or pa.types.is_large_list(column.type)
    if column.name in READ or not is_list:
        return False
    return sum(_holds_text(each.type) for each in _inner(column.type.value_type)) > 1
