"""A folder of images at any depth, for annotation: rows with an image and no conversation.

A row's position is its image's in the order of names; its id and its image are the path below the folder, which is the
image root as well. Nothing can be learned from such a row, so `prepare` refuses the format. Who annotates puts a
question into `messages`, has it answered, and writes a corpus of another format.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pipelines import storage
from pipelines.corpora.spans import Extent, Span
from pipelines.records import FileFormatError, Record, Row, RowError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")


def scan(path: str) -> Iterator[Extent]:
    """The images below the folder `path`, by number; other files are passed over. Looks at the folder anew."""
    return (Extent(row, row + 1, row + 1, size=0) for row in range(len(_look(path).names)))


def read(path: str, span: Span) -> Iterator[Row]:
    """The rows of `span`, in order, by the listing that this process has made of the folder `path`."""
    listing = _listings.get(path) or _look(path)
    names = listing.names[span.start : span.stop]
    if len(names) < span.stop - span.start:
        raise FileFormatError(f"{path}: has fewer images than when it was looked at first")
    for position, name in enumerate(names, start=span.start):
        if name.isprintable():
            yield Row(position, storage.join(path, name), Record([], id=name, image=name))
        else:  # bytes that are no UTF-8 among them
            error = RowError("row_malformed", f"{name!r}: not a name that can be written down")
            yield Row(position, storage.join(path, repr(name)), error)


def fingerprint(path: str, expected: str | None = None) -> str:
    """What changes when an image below the folder `path` does, or one comes or goes; of other files it knows nothing.

    As of when this process listed the folder; it looks again unless that is `expected`.
    """
    listing = _listings.get(path)
    return (listing if listing and listing.fingerprint == expected else _look(path)).fingerprint


class _Listing(NamedTuple):
    fingerprint: str
    names: tuple[str, ...]


# A folder of a million objects takes a minute to list in an object store, so each process does it once, not per span.
_listings: dict[str, _Listing] = {}


def _look(path: str) -> _Listing:
    files = {name: stamp for name, stamp in storage.list_files(path).items() if name.lower().endswith(SUFFIXES)}
    _listings[path] = _Listing(storage.folder_fingerprint(files), tuple(files))
    return _listings[path]
