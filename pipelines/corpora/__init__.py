"""Corpora: a module per format, which knows files and fields, and no tokenizer.

To add a format, write a module with `scan(path) -> Iterator[Extent]`, which says where each row lies without parsing
it, and `read(path, span) -> Iterator[Row]`, which parses the rows of one span; then name it here.
"""

from collections.abc import Iterator
from typing import Protocol

from pipelines.corpora import images, llava, messages, parquet, sharegpt, webdataset
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
    "parquet": parquet,
    "webdataset": webdataset,
    "images": images,
}
