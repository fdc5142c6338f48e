"""A folder of images at any depth, for annotation: rows with an image and no conversation.

A row's position is its image's in the order of names; its id and its image are the path below the folder, which is the
image root as well. Nothing can be learned from such a row, so `prepare` refuses the format. Who annotates puts a
question into `messages`, has it answered, and writes a corpus of another format.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from pipelines import storage
from pipelines.corpora.spans import Extent, Span
from pipelines.records import FileFormatError, Record, Row, RowError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def scan(path: str) -> Iterator[Extent]:
    """The images below the folder `path`, by number; other files are passed over."""
    return (Extent(row, row + 1, row + 1) for row in range(len(_names(path))))


def read(path: str, span: Span) -> Iterator[Row]:
    """The rows of `span`, in order. A process lists the folder once, and again where it has changed since."""
    names = _listing(path, storage.fingerprint(path))[span.start : span.stop]
    if len(names) < span.stop - span.start:
        raise FileFormatError(f"{path}: has fewer images than when it was looked at first")
    for position, name in enumerate(names, start=span.start):
        location = storage.join(path, name)
        content: Record | RowError = Record([], id=name, image=name)
        if "\0" in name or not name.isprintable():
            content = RowError("row_malformed", f"{name!r}: not a name that can be written down")
        yield Row(position, location, content)


@lru_cache(maxsize=2)
def _listing(path: str, fingerprint: str) -> tuple[str, ...]:
    return _names(path)


def _names(path: str) -> tuple[str, ...]:
    return tuple(name for name in storage.list_files(path) if name.lower().endswith(SUFFIXES))
