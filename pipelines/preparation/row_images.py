"""The images of a chunk's rows, fetched ahead from wherever they lie. Plain Python: nothing here knows of Ray."""

from __future__ import annotations

import posixpath
import re
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from pipelines import storage
from pipelines.preparation.image_pins import ImagePins
from pipelines.preparation.sources import PlanError, SourceTerms
from pipelines.records import Row, RowError
from pipelines.storage.states import NO_REGULAR_FILE, NOT_THERE, ObjectFolder, TooLargeError

# Images of a chunk are fetched ahead of the one that is asked for: an object store answers in tens of milliseconds.
_FETCH_THREADS = 16
_FETCHED_AHEAD = 64  # rows
# Of a thread. To hand rows over costs as much as to read a file; a disk does not gain by many threads, a store does.
_ROWS_AT_ONCE, _ROWS_AT_ONCE_OF_DISK = 4, 16
# Far above any image that is taken: 50 million pixels of four channels with 16 bits each, not compressed, are 400 MB.
_MOST_BYTES = 2**29
# Of an address that is no path. A file may be named a:b.jpg, but the two that need no slash are taken at their word.
_SCHEME = re.compile(r"^(?:[a-zA-Z][a-zA-Z0-9+.-]*:/|(?i:data|file):)")

MAY_HOLD_IMAGES = ("parquet", "messages", "webdataset")
"""Formats whose rows may bring their image instead of naming it."""

Made = TypeVar("Made")


@dataclass(frozen=True)
class SourceFiles:
    """Where a process finds a source: its file, and the folder of its images."""

    path: str
    image_root: str | None


def source_files(sources: Sequence[SourceTerms]) -> tuple[SourceFiles, ...]:
    """Where any process finds `sources`."""
    return tuple(
        SourceFiles(storage.resolve(source.path), storage.resolve(source.image_root) if source.image_root else None)
        for source in sources
    )


class ImageFolder:
    """Where the images of a source lie.

    Args:
        place: the folder or URI where this process finds them.
        root: as the source has it.
        pins: the state that they must be in; None where they may change.
    """

    def __init__(self, place: str, root: str = "", pins: ImagePins | None = None) -> None:
        self._objects = ObjectFolder(place)
        self._root = root
        self._pins = pins

    @property
    def is_local(self) -> bool:
        """Whether they lie on this machine."""
        return self._objects.is_local

    def read(self, image: str) -> bytes:
        """The bytes of the file `image` of the folder.

        Raises:
            RowError: path_not_allowed, image_missing, image_not_a_file, image_forbidden or image_too_many_bytes.
            PlanError: it is not in the state that is pinned.
        """
        image = plain_path(image)
        try:
            data, state = self._objects.read(image, _MOST_BYTES)
        except TooLargeError as error:
            if self._pins:
                self._pins.check(self._root, image, error.state)
            raise RowError("image_too_many_bytes", str(error)) from error
        except PermissionError as error:
            detail = f"{image!r}: may not be read below {self._objects.uri} ({error.strerror})"
            raise RowError("image_forbidden", detail) from error
        except OSError as error:
            if error.errno not in NOT_THERE:
                raise
            if self._pins:
                self._pins.check(self._root, image, None)
            if error.errno == NO_REGULAR_FILE:
                detail = f"{image!r}: a socket or a device below {self._objects.uri}"
                raise RowError("image_not_a_file", detail) from error
            raise RowError("image_missing", f"{image!r}: no such file below {self._objects.uri}") from error
        if self._pins:
            self._pins.check(self._root, image, state)
        return data


def with_images(
    rows: Sequence[Row],
    images: ImageFolder | None,
    source: SourceTerms,
    make: Callable[[Row, bytes | RowError | None], Made],
) -> Iterator[tuple[Row, Made]]:
    """`rows` of `source`, in order, each with what `make` makes of it and its image; done ahead, by threads.

    `make` gets the image as received, why it cannot be had, or None where the row has none.

    Raises:
        PlanError: as `row_image`.
        Exception: what `make` raised.
    """

    def do(row: Row) -> Made:
        try:
            image = row_image(row, images, source)
        except RowError as error:
            return make(row, error)
        return make(row, image)

    def do_all(some: Sequence[Row]) -> list[tuple[Row, Made]]:
        return [(row, do(row)) for row in some]

    at_once = _ROWS_AT_ONCE_OF_DISK if images is None or images.is_local else _ROWS_AT_ONCE
    with ThreadPoolExecutor(_FETCH_THREADS) as threads:
        waiting: deque[Future[list[tuple[Row, Made]]]] = deque()
        try:
            for start in range(0, len(rows), at_once):
                waiting.append(threads.submit(do_all, rows[start : start + at_once]))
                if len(waiting) >= _FETCHED_AHEAD // at_once:
                    yield from waiting.popleft().result()
            while waiting:
                yield from waiting.popleft().result()
        finally:
            threads.shutdown(wait=False, cancel_futures=True)


def row_image(row: Row, images: ImageFolder | None, source: SourceTerms) -> bytes | None:
    """The image of `row`, a row of `source`, as received; None where it has none.

    Raises:
        RowError: as `ImageFolder.read`; image_missing: it names its image where others may bring theirs, and `images`
            is None.
        PlanError: it names its image, as all rows of its format do, and `images` is None; or as `ImageFolder.read`.
    """
    image = None if isinstance(row.content, RowError) else row.content.image
    if not isinstance(image, str):
        return image
    check_path(image)
    if images is None and source.format in MAY_HOLD_IMAGES:
        # The others need no root. To give the source one is to begin anew, which one row is not worth.
        raise RowError("image_missing", f"names {image!r}, has no bytes, and the source has no image_root")
    if images is None:
        raise PlanError(
            f"source '{source.name}': {row.location} has an image, but the source has no image_root: set it"
        )
    return images.read(image)


def check_path(image: str) -> None:
    """Raise RowError path_not_allowed unless `image` is a path that stays below the folder it is joined to."""
    if image.startswith(("/", "\\")) or _SCHEME.match(image) or ".." in re.split(r"[/\\]", image):
        raise RowError("path_not_allowed", f"{image!r}: an image is a path below the source's image_root")


def plain_path(image: str) -> str:
    """`image` in its simplest form: what ./a//b.jpg is on a disk it is in a bucket too.

    Raises:
        RowError: path_not_allowed.
    """
    check_path(image)
    return posixpath.normpath(image)


def fetch_image(place: str, image: str) -> bytes:
    """The bytes of the file `image` below `place`. Raises: as `ImageFolder.read`."""
    return ImageFolder(place).read(image)
