"""The columns of a Parquet file: which are read, and which must not be passed over in silence."""

from __future__ import annotations

import pyarrow as pa

from pipelines.corpora import fields, image_names, typed_content
from pipelines.corpora.fields import CONVERSATIONS
from pipelines.records import FileFormatError

CAPTIONS = ("caption", "text")
_IMAGES = ("image", "images")
READ = ("id", *fields.MEDIA, *CONVERSATIONS, "question", "answer", *CAPTIONS, "system", "tools", "question_types")
"""Columns that are read where there are such."""
# Such a column says something about the image, which would be lost where nothing else is read; `label` or `url` do not.
_TELLING = (
    *("prompt", "completion", "question", "questions", "answer", "answers"),
    *("instruction", "output", "response", "conversation", "dialog", "dialogue", "captions"),
)


def check(schema: pa.Schema, path: str) -> None:
    """Raise FileFormatError unless all that the rows of the file `path` seem to say is read."""
    names = set(schema.names)
    twice = next((column.name for column in schema if column.name in READ and _has_twice(column.type)), None)
    if twice is not None:
        raise FileFormatError(f"{path}: two fields in {twice} have one name, of which one would be lost; rename one")
    unread = [column for column in schema if column.name not in READ]
    others = [column.name for column in unread if _holds_image(column.type)]
    if others:
        raise FileFormatError(
            f"{path}: holds images in {', '.join(others)}, and none but those in image or images are read: rename the "
            "column so, and drop the others"
        )
    if not names & set(_IMAGES) and not any(_has_address(column) for column in schema):
        _check_named_otherwise(unread, path)
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


def _check_named_otherwise(unread: list[pa.Field], path: str) -> None:
    """Raise FileFormatError where one of the columns `unread`, of a file without `image` or `images`, may be that."""
    found = [column.name for column in unread if _may_be_image(column)]
    if found:
        raise FileFormatError(
            f"{path}: has no image or images, but {', '.join(found)}, which would not be read: rename the one that is "
            "the image, or names it, to image; drop what is none"
        )


def _has_address(column: pa.Field) -> bool:
    """Whether it is one of turns whose typed content may hold or name an image."""
    return column.name in CONVERSATIONS and not _names(column.type).isdisjoint((*typed_content.ADDRESSES, "image_url"))


def _may_be_image(column: pa.Field) -> bool:
    """Whether it is an image or names one: by its name, or since it holds a struct of bytes."""
    return _holds_bytes_by_name(column.type) or (image_names.seems_image(column.name) and _holds_data(column.type))


def _plain(kind: pa.DataType) -> pa.DataType:
    """What `kind` spells in another way: the type of a dictionary's values, the storage of an extension."""
    if pa.types.is_dictionary(kind):
        return _plain(kind.value_type)
    return _plain(kind.storage_type) if isinstance(kind, pa.BaseExtensionType) else kind


def _inner(kind: pa.DataType) -> list[pa.Field]:
    return [kind.field(number) for number in range(kind.num_fields)]


def _names(kind: pa.DataType) -> set[str]:
    inner = _inner(kind)
    return {each.name for each in inner}.union(*(_names(each.type) for each in inner))


def _holds_image(kind: pa.DataType) -> bool:
    """Whether `kind` is a struct of bytes and path, or has one in it."""
    inner = _inner(kind)
    return {each.name for each in inner} >= {"bytes", "path"} or any(_holds_image(each.type) for each in inner)


def _holds_bytes_by_name(kind: pa.DataType) -> bool:
    inner = _inner(kind)
    return any((each.name == "bytes" and _holds_data(each.type)) or _holds_bytes_by_name(each.type) for each in inner)


def _holds_data(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    return is_bytes or _holds_text(kind) or any(_holds_data(each.type) for each in _inner(kind))


def _holds_text(kind: pa.DataType) -> bool:
    kind = _plain(kind)
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    return is_text or any(_holds_text(each.type) for each in _inner(kind))


def _holds_turns(column: pa.Field) -> bool:
    """Whether it is not read, and a list of structs, or a struct of lists, in which two fields hold text: who speaks,
    and what."""
    kind = _plain(column.type)
    if _is_list(kind):
        kind = kind.value_type
    elif not all(_is_list(each.type) for each in _inner(kind)):
        return False
    return column.name not in READ and sum(_holds_text(each.type) for each in _inner(kind)) > 1


def _is_list(kind: pa.DataType) -> bool:
    return hasattr(kind, "value_type") and not pa.types.is_dictionary(kind)


def _has_twice(kind: pa.DataType) -> bool:
    names = [each.name for each in _inner(kind)]
    return len(names) > len(set(names)) or any(_has_twice(each.type) for each in _inner(kind))
