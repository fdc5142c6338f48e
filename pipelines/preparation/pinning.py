"""Finding the state of every image that rows name: by listing the folders that they name, not by asking for each.

Plain Python: `indexing` makes tasks of it.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import numpy as np

from pipelines.corpora.spans import MOST_BYTES
from pipelines.preparation.chunks import Chunk, read_chunk
from pipelines.preparation.image_pins import ImagePins, image_hash
from pipelines.preparation.row_images import MAY_HOLD_IMAGES, SourceFiles, plain_path, row_image
from pipelines.preparation.sources import SourceTerms
from pipelines.records import RowError
from pipelines.storage.states import ObjectFolder

_ROWS_AT_ONCE = 20_000  # parsed and held by a task: tens of megabytes, unless they bring images (MOST_BYTES)
_LISTED_AT_ONCE = 10_000  # objects of a folder, which may have many that no row names
_FOLDERS_AT_ONCE = 64
_THREADS = 16  # an object store answers in tens of milliseconds

Each = Callable[[Callable[..., Any], tuple[Any, ...], list[tuple[Any, ...]]], list[Any]]
"""Calls a function several times, first with what all calls share and then with what each has of its own."""


def in_turn(function: Callable[..., Any], shared: tuple[Any, ...], calls: list[tuple[Any, ...]]) -> list[Any]:
    """One call after the other, in this process."""
    return [function(*shared, *call) for call in calls]


@dataclass(frozen=True)
class Named:
    """The images that rows name."""

    names: np.ndarray
    """uint64[N], sorted: `image_hash` of each once."""
    folders: frozenset[str]
    """Folders below the root that hold them."""


@dataclass(frozen=True)
class Listed:
    """What was found of the images that are named."""

    states: np.ndarray
    """uint64[N, 3]: `image_hash`, size, stamp."""
    closed: tuple[str, ...]
    """Folders that may not be listed."""


def stretches(sources: Sequence[SourceTerms], chunks: Sequence[Chunk]) -> list[Chunk]:
    """The rows of `chunks` that may name images, in runs that are larger than chunks: nothing is decoded of them.

    Without an image root, those that must not name any.
    """
    naming = (
        chunk
        for chunk in chunks
        # What is taken a second time was taken a first time.
        if chunk.repeat == 0
        and (sources[chunk.source].image_root or sources[chunk.source].format not in MAY_HOLD_IMAGES)
    )
    runs: list[Chunk] = []
    for chunk in naming:
        if runs and _may_join(runs[-1], chunk):
            last = runs[-1]
            joined = {"stop": chunk.stop, "rows": last.rows + chunk.rows, "size": last.size + chunk.size}
            runs[-1] = last.model_copy(update=joined)
        else:
            runs.append(chunk)
    return runs


def _may_join(run: Chunk, chunk: Chunk) -> bool:
    """Whether a task can hold `run` and the later `chunk`, with the rows between them that a weight passes over."""
    rows = chunk.first_row + chunk.rows - run.first_row
    row_bytes = max(run.size / run.rows, chunk.size / chunk.rows)
    return run.source == chunk.source and rows <= _ROWS_AT_ONCE and rows * row_bytes <= MOST_BYTES


def find_pins(
    sources: Sequence[SourceTerms], files: Sequence[SourceFiles], chunks: Sequence[Chunk], each: Each = in_turn
) -> ImagePins | None:
    """The pins of a plan with these `chunks`, as the images are now; None where no row can name one.

    Raises: as `named_images`; StorageError: a store kept failing.
    """
    runs = stretches(sources, chunks)
    parts = each(named_images, (), [(sources[run.source], files[run.source].path, run) for run in runs])
    roots = dict.fromkeys(sources[run.source].image_root for run in runs if sources[run.source].image_root)
    if not roots:
        return None
    found, absent, unpinned = [np.empty((0, 3), np.uint64)], [np.empty(0, np.uint64)], 0
    for root in map(str, roots):
        of_root = [number for number, run in enumerate(runs) if sources[run.source].image_root == root]
        named = merge(parts[number] for number in of_root)
        place = str(files[runs[of_root[0]].source].image_root)
        folders = sorted(named.folders)
        lots = [(folders[start : start + _FOLDERS_AT_ONCE],) for start in range(0, len(folders), _FOLDERS_AT_ONCE)]
        listed = each(list_images, (root, place, named.names), lots)
        found += [part.states for part in listed]
        missing = np.setdiff1d(named.names, np.concatenate([found[0], *(part.states for part in listed)])[:, 0])
        if any(part.closed for part in listed):
            unpinned += len(missing)  # they may be there
        else:
            absent.append(missing)
    return ImagePins.of(np.concatenate(found), np.concatenate(absent), unpinned)


def named_images(source: SourceTerms, path: str, stretch: Chunk) -> Named:
    """The images that the rows of `stretch` name.

    Raises: as `read_chunk`; PlanError: there is one, and `source` has no image_root and needs one.
    """
    names: set[int] = set()
    folders: set[str] = set()
    for row in read_chunk(source, path, stretch):
        image = None if isinstance(row.content, RowError) else row.content.image
        if not isinstance(image, str):
            continue
        try:
            image = plain_path(image)
            if source.image_root is None:
                row_image(row, None, source)
        except RowError:
            continue  # its row goes to the quarantine
        names.add(image_hash(str(source.image_root), image))
        folders.add(posixpath.dirname(image))
    return Named(np.array(sorted(names), np.uint64), frozenset(folders))


def merge(parts: Iterable[Named]) -> Named:
    """All that `parts` name."""
    held = list(parts)
    names = np.unique(np.concatenate([part.names for part in held]))
    return Named(names, frozenset[str]().union(*(part.folders for part in held)))


def list_images(root: str, place: str, names: np.ndarray, folders: Sequence[str]) -> Listed:
    """The states of the images with the hashes `names` in `folders` of the root.

    Args:
        root: as the source has it.
        place: where this process finds it.
        names: uint64[N], of the whole root, sorted.
        folders: of it.
    """
    images = ObjectFolder(place)
    if not images.tells_states:
        return Listed(np.empty((0, 3), np.uint64), tuple(folders))
    look = partial(_look, images, root, names)
    if images.is_local:
        found = list(map(look, folders))
    else:
        with ThreadPoolExecutor(_THREADS) as threads:
            found = list(threads.map(look, folders))
    states = [each for each in found if each is not None]
    closed = tuple(folder for folder, each in zip(folders, found, strict=True) if each is None)
    return Listed(np.concatenate([np.empty((0, 3), np.uint64), *states]), closed)


def _look(images: ObjectFolder, root: str, names: np.ndarray, folder: str) -> np.ndarray | None:
    """uint64[N, 3] of the named images in `folder`; None where it may not be listed."""
    found = [np.empty((0, 3), np.uint64)]
    states = images.states(folder)
    try:
        while some := list(islice(states, _LISTED_AT_ONCE)):
            rows = [(image_hash(root, posixpath.join(folder, name)), *state) for name, state in some]
            table = np.array(rows, np.uint64)
            # `np.isin` would sort all names anew for each folder.
            nearest = names.take(np.searchsorted(names, table[:, 0]), mode="clip")
            found.append(table[nearest == table[:, 0]])
    except PermissionError:
        return None
    return np.concatenate(found)
