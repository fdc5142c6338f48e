"""Corpora: a module per format, which knows files and fields, and no tokenizer.

To add a format:

1. Write a module here with `scan(path) -> Iterator[Extent]`, which says where each row of a file lies, and
   `read(path, span) -> Iterator[Row]`, which parses the rows of one span. `sharegpt` is a short one on top of
   `json_rows`; `parquet` has files of its own kind. Open files by `pipelines.storage`, so that they may lie anywhere.
2. A row becomes a Record: messages without a marker for the image, and the image as a path below the source's image
   root or as encoded bytes. A row that cannot become one carries a RowError with a reason, and stops nothing. A file
   that is none of the format is a FileFormatError that names it. `fields` has what formats share.
3. Name the module in FORMATS. The identity of the code, by which a preparation knows that it is resumed with other
   code, covers every module of this package by itself.
4. Test it as tests/pipelines/test_corpora_sharegpt.py does: good rows, bad rows, broken files.
"""

from collections.abc import Iterator
from typing import Protocol

from pipelines.corpora import images, llava, messages, parquet, questions, sharegpt, webdataset
from pipelines.corpora.spans import Extent, Span
from pipelines.records import Row


class Format(Protocol):
    """What a format module offers."""

    def scan(self, path: str) -> Iterator[Extent]:
        """Where each row of the file `path` lies, in order; one pass, constant memory."""

    def read(self, path: str, span: Span) -> Iterator[Row]:
        """The rows of `span`, in order; what cannot be a record carries a RowError and stops nothing."""


FORMATS: dict[str, Format] = {
    "llava": llava,
    "sharegpt": sharegpt,
    "messages": messages,
    "questions": questions,
    "parquet": parquet,
    "webdataset": webdataset,
    "images": images,
}
