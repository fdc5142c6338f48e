"""WebDataset: tars in which the files of one sample stand together and share a name up to its first dot.

    a/000017.jpg     the image
    a/000017.json    `{"conversations"}` (ShareGPT's or LLaVA's turns) or `{"messages"}`, with an `id` if there is one
    a/000017.txt     or a caption instead; `{"caption"}` in the json does as well (img2dataset writes both)

A caption becomes an answer to an empty question, which the caption layout throws away anyhow. A scan reads the headers
alone where the tar lies on a disk, and a chunk is one range of bytes. A tar that is compressed cannot be read so.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import groupby

from pipelines import storage
from pipelines.corpora import fields, json_rows, messages, sharegpt, tars
from pipelines.corpora.spans import Extent, Span
from pipelines.records import Message, Record, Row, RowError

IMAGE_SUFFIXES = ("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "gif")


def scan(path: str) -> Iterator[Extent]:
    """Where each sample of the tar `path` lies.

    Raises:
        FileFormatError: it is no tar, is cut short, or goes on after its end.
    """
    with storage.open_file(path) as file:
        members = tars.members(file, path, ends=True)
        for row, (_, sample) in enumerate(groupby(members, key=lambda member: _split(member.name)[0])):
            first, *others = sample
            last = others[-1] if others else first
            yield Extent(first.offset, last.offset_data + -(-last.size // tars.BLOCK) * tars.BLOCK, row + 1)


def read(path: str, span: Span) -> Iterator[Row]:
    """The samples of `span`, in order; one that is no record carries a RowError."""
    file = io.BytesIO(storage.read_range(path, span.start, span.stop))
    samples = groupby(tars.members(file, path, ends=False), key=lambda member: _split(member.name)[0])
    for position, (name, sample) in enumerate(samples, start=span.first_row):
        parts = [(_split(each.name)[1], file.getbuffer()[each.offset_data :][: each.size].tobytes()) for each in sample]
        content: Record | RowError
        try:
            content = _record(name, parts)
        except RowError as error:
            content = error
        yield Row(position, f"{path}:{name} (sample {position})", content)


def _record(name: str, parts: list[tuple[str, bytes]]) -> Record:
    held = dict(parts)
    row = json_rows.parse(held["json"]) if "json" in held else {}
    if isinstance(row, RowError):
        raise row
    own_id = fields.own_id(row) or name
    images = [data for suffix, data in parts if suffix in IMAGE_SUFFIXES]
    # What the row itself says of images are names that they had before they came into the tar.
    row = {field: value for field, value in row.items() if field != "image"} | {"id": own_id, "images": images}
    if "messages" in row:
        return messages.record(row)
    if "conversations" in row:
        return sharegpt.record(row)
    return fields.record(row, own_id, _caption(row, held, own_id), fields.one_image(images, own_id))


def _caption(row: dict[str, object], held: dict[str, bytes], own_id: str) -> list[Message]:
    caption = row.get("caption")
    try:
        caption = held["txt"].decode("utf-8-sig") if "txt" in held else caption
    except UnicodeDecodeError as error:
        raise RowError("row_malformed", f"the txt is not UTF-8: {error.reason} at {error.start}", own_id) from error
    if not isinstance(caption, str):
        detail = f"has {', '.join(sorted(held))}, but neither a json with messages, conversations or caption nor a txt"
        raise RowError("row_malformed", detail, own_id)
    answer = fields.text(caption.strip(), "caption", own_id)
    return [Message(role="user", content=""), Message(role="assistant", content=answer)]


def _split(name: str) -> tuple[str, str]:
    """What the files of a sample share of their names, and the suffix."""
    folder, slash, base = name.removeprefix("./").rpartition("/")
    stem, _, suffix = base.partition(".")
    return folder + slash + stem, suffix.lower()
