"""WebDataset: tars in which the files of one sample stand together and share a name up to its first dot.

    a/000017.jpg     the image
    a/000017.json    `{"conversations"}` (ShareGPT's or LLaVA's turns), `{"messages"}`, `{"texts"}` (pairs of `user` and
                     `assistant`) or `{"question", "answer"}`, with an `id` if there is one
    a/000017.txt     or a caption instead; `{"caption"}` in the json does as well (img2dataset writes both)

A file is taken for what its name ends in: 000017.image.jpg is an image, 000017.caption.txt a text. What a json calls an
image that stands beside it is a name from before the tar, and is passed over; where none does, it is looked for below
the source's image root. A caption becomes an answer to an empty question, which the caption layout throws away anyhow.
An image without any text is there to be annotated: nothing can be learned from it. Files that nobody reads beside image
and text are passed over; a sample that lacks either is quarantined where such a file may be it. A scan reads the
headers alone where the tar lies on a disk, and a chunk is one range of bytes. A tar that is compressed cannot be read
so. A link to another file is not followed, which may lie far from the chunk, nor are holes filled that were left out of
a file (tar --sparse): such samples are quarantined.
"""

from __future__ import annotations

import io
from collections.abc import Iterator

from pipelines import storage
from pipelines.corpora import (
    captions,
    fields,
    json_rows,
    messages,
    question_pairs,
    questions,
    sharegpt,
    tar_samples,
    tars,
    typed_content,
)
from pipelines.corpora.spans import Extent, Span
from pipelines.records import Record, Row, RowError


def scan(path: str) -> Iterator[Extent]:
    """Where each sample of the tar `path` lies.

    Raises:
        FileFormatError: it is no tar, is cut short, or goes on after its end.
    """
    with storage.open_file(path) as file:
        for row, (_, members) in enumerate(tar_samples.groups(tars.members(file, path, ends=True))):
            first, *others = members
            start, stop = first.offset, tars.stop(others[-1] if others else first)
            yield Extent(start, stop, row + 1, stop - start)


def read(path: str, span: Span) -> Iterator[Row]:
    """The samples of `span`, in order; one that is no record carries a RowError."""
    file = io.BytesIO(storage.read_range(path, span.start, span.stop))
    groups = tar_samples.groups(tars.members(file, path, ends=False))
    for position, (name, members) in enumerate(groups, start=span.first_row):
        content: Record | RowError
        try:
            content = _record(tar_samples.load(file, name, members))
        except RowError as error:
            content = error
        yield Row(position, f"{path}:{name} (sample {position})", content)


def _record(sample: tar_samples.Sample) -> Record:
    texts = sample.texts()
    row = json_rows.parse(texts["json"]) if "json" in texts else {}
    if isinstance(row, RowError):
        raise row
    own_id = fields.own_id(row) or sample.name
    images = sample.images(own_id)
    row |= {"id": own_id}
    if images:  # What the row itself says of them are names that they had before they came into the tar.
        row |= {"image": None, "images": images}
    else:
        sample.check_whole("image", own_id)
    if "messages" in row:
        if images:
            typed_content.without_names(row["messages"])
        return messages.record(row)
    if "conversations" in row:
        return sharegpt.record(row)
    if row.get("texts") is not None:
        return question_pairs.record(row)
    if row.get("question") is not None:
        return questions.record(row)
    image = fields.one_image(fields.images(row, own_id), own_id)
    caption = _text(texts["txt"], own_id) if "txt" in texts else row.get("caption")
    if caption is None and images:
        sample.check_whole("text", own_id)
        return fields.record(row, own_id, [], image)
    if not isinstance(caption, str):
        kinds = "messages, conversations, texts, question or caption"
        detail = f"has {sample.suffixes()}, but neither a json with {kinds} nor a txt"
        raise RowError("row_malformed", detail, own_id)
    return fields.record(row, own_id, captions.turns(caption, own_id), image)


def _text(data: bytes, own_id: str) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RowError("row_malformed", f"the txt is not UTF-8: {error.reason} at {error.start}", own_id) from error
