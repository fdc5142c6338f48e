"""WebDataset: tars in which the files of one sample stand together and share a name up to its first dot.

    a/000017.jpg     the image
    a/000017.json    `{"conversations"}` (ShareGPT's or LLaVA's turns) or `{"messages"}`, with an `id` if there is one
    a/000017.txt     or a caption instead; `{"caption"}` in the json does as well (img2dataset writes both)

What a json calls an image that stands beside it is a name from before the tar, and is passed over. A caption becomes an
answer to an empty question, which the caption layout throws away anyhow. An image without any text is there to be
annotated: nothing can be learned from it. A scan reads the headers alone where the tar lies on a disk, and a chunk is
one range of bytes. A tar that is compressed cannot be read so. A link to another file is not followed, which may lie
far from the chunk, nor are holes filled that were left out of a file (tar --sparse): such samples are quarantined.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from tarfile import TarInfo

from pipelines import storage
from pipelines.corpora import fields, json_rows, messages, sharegpt, tars, typed_content
from pipelines.corpora.spans import Extent, Span
from pipelines.records import Message, Record, Row, RowError

IMAGE_SUFFIXES = (
    *("jpg", "jpeg", "jfif", "png", "webp", "bmp", "tif", "tiff", "gif"),
    # These will be refused, and not be taken for rows without an image.
    *("avif", "heic", "heif", "jp2", "jxl", "svg", "ppm", "pgm", "pbm", "pnm", "jpe"),
    *("tga", "ico", "dib", "img", "image"),
)
_OTHER_MEDIA = ("mp4", "webm", "avi", "mov", "mkv", "mp3", "wav", "flac", "ogg", "m4a")
_READ = (*IMAGE_SUFFIXES, "json", "txt")


def scan(path: str) -> Iterator[Extent]:
    """Where each sample of the tar `path` lies.

    Raises:
        FileFormatError: it is no tar, is cut short, or goes on after its end.
    """
    with storage.open_file(path) as file:
        members = tars.members(file, path, ends=True)
        for row, (_, sample) in enumerate(tars.samples(members, _READ)):
            first, *others = sample
            last = others[-1] if others else first
            start, stop = first.offset, tars.stop(last)
            yield Extent(start, stop, row + 1, stop - start)


def read(path: str, span: Span) -> Iterator[Row]:
    """The samples of `span`, in order; one that is no record carries a RowError."""
    file = io.BytesIO(storage.read_range(path, span.start, span.stop))
    samples = tars.samples(tars.members(file, path, ends=False), _READ)
    for position, (name, sample) in enumerate(samples, start=span.first_row):
        files, odd = [], []
        for each in sample:
            if not tars.is_plain(each):
                odd.append(each)
            else:
                data = file.getbuffer()[each.offset_data :][: each.size]
                files.append((tars.split(each.name)[1], data.tobytes()))
        content: Record | RowError
        try:
            content = _record(name, files, odd)
        except RowError as error:
            content = error
        yield Row(position, f"{path}:{name} (sample {position})", content)


def _record(name: str, files: list[tuple[str, bytes]], odd: list[TarInfo]) -> Record:
    held = dict(files)
    twice = next((suffix for suffix in ("json", "txt") if [each for each, _ in files].count(suffix) > 1), None)
    if twice:
        raise RowError("row_malformed", f"has two files {twice}", name)
    row = json_rows.parse(held["json"]) if "json" in held else {}
    if isinstance(row, RowError):
        raise row
    own_id = fields.own_id(row) or name
    tars.refuse(odd, IMAGE_SUFFIXES, own_id)
    images = [data for suffix, data in files if suffix in IMAGE_SUFFIXES]
    media = next((suffix for suffix in held if suffix in _OTHER_MEDIA), None)
    if media and not images:
        raise RowError("media_not_supported", f"has {media} and no image; FlashSloth looks at an image", own_id)
    # What the row itself says of images are names that they had before they came into the tar.
    row = {field: value for field, value in row.items() if field != "image"} | {"id": own_id, "images": images}
    if "messages" in row:
        if images:
            typed_content.without_names(row["messages"])
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
    if caption is None and any(suffix in IMAGE_SUFFIXES for suffix in held):
        return []
    if not isinstance(caption, str):
        detail = f"has {', '.join(sorted(held))}, but neither a json with messages, conversations or caption nor a txt"
        raise RowError("row_malformed", detail, own_id)
    answer = fields.text(caption.strip(), "caption", own_id)
    return [Message(role="user", content=""), Message(role="assistant", content=answer)]
