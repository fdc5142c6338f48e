"""Pins: the state that every image had when the plan was made, for images that rows name by their path.

A corpus file is pinned by its fingerprint in the plan. Images are many: their states lie in a table of 24 bytes each
beside the plan, named by its hash, and the plan names the table. A worker compares what it has just read.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import xxhash
from pydantic import BaseModel, ConfigDict

from pipelines import storage
from pipelines.preparation.sources import PlanError
from pipelines.storage.states import State

PIN_FOLDER = "pins"
PIN_SCHEMA = pa.schema([(name, pa.uint64()) for name in ("name", "size", "stamp")])
"""name: a hash of the image's root and its path below that; size and stamp: see State."""
_COLUMNS = tuple(PIN_SCHEMA.names)
_ABSENT = State(2**64 - 1, 0)


class PinFacts(BaseModel):
    """What the plan says of its pins."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """Path of the table below the dataset's folder."""
    sha256: str
    images: int
    """Different images that are pinned, those included that were not there."""
    absent: int
    """Images that were not there."""
    unpinned: int
    """Images that cannot be: their folder may not be listed, or tells no states."""


class ImagePins:
    """The pins of a plan.

    Args:
        table: uint64[N], uint64[N], uint64[N] by the names of PIN_SCHEMA, sorted by `name`, no name twice.
        unpinned: number of images that are named and not in it.
    """

    def __init__(self, table: dict[str, np.ndarray], unpinned: int = 0) -> None:
        self.table = table
        self.unpinned = unpinned

    @classmethod
    def of(cls, found: np.ndarray, absent: np.ndarray, unpinned: int) -> ImagePins:
        """Pins of what was found (uint64[N, 3]: columns of PIN_SCHEMA), and was not: uint64[N] names, in any order."""
        gone = np.empty((len(absent), 3), np.uint64)
        gone[:] = (0, *_ABSENT)
        gone[:, 0] = absent
        rows = np.concatenate([found, gone])
        _, places, counts = np.unique(rows[:, 0], return_index=True, return_counts=True)
        once = counts == 1  # two images with one hash: neither can be told apart, so neither is pinned
        rows = rows[places[once]]
        columns = {name: np.ascontiguousarray(rows[:, number]) for number, name in enumerate(_COLUMNS)}
        return cls(columns, unpinned + int(counts[~once].sum()))

    def check(self, root: str, image: str, now: State | None) -> None:
        """Raise PlanError unless the state `now` of `image` below `root` is the pinned one; None where it is gone."""
        pinned = self._pinned(image_hash(root, image))
        if pinned is None or pinned == (now or _ABSENT):
            return
        then = "not there" if pinned == _ABSENT else str(pinned)
        raise PlanError(
            f"{storage.join(root, image)} has changed since the plan was made (size and stamp then {then}, now "
            f"{now or 'not there'}); prepare it as it is now into another output"
        )

    def facts(self) -> PinFacts:
        """What the plan says of them."""
        digest = storage.sha256(self._bytes())
        return PinFacts(
            name=f"{PIN_FOLDER}/{digest}.arrow",
            sha256=digest,
            images=len(self.table["name"]),
            absent=int((self.table["size"] == _ABSENT.size).sum()),
            unpinned=self.unpinned,
        )

    def store(self, folder: str) -> None:
        """Write the table below `folder`, as `facts` names it."""
        storage.write_bytes(storage.join(folder, self.facts().name), self._bytes())

    @classmethod
    def load(cls, folder: str, facts: PinFacts) -> ImagePins:
        """The pins of the plan in `folder`.

        Raises:
            PlanError: the table is missing, or is not the one that was written.
        """
        uri = storage.join(folder, facts.name)
        try:
            data = storage.read_bytes(uri)
        except FileNotFoundError as error:
            raise PlanError(f"{uri}: no such file, which the plan names: restore it, or use another output") from error
        if (digest := storage.sha256(data)) != facts.sha256:
            raise PlanError(f"{uri}: expected sha256 {facts.sha256}, found {digest}: restore it, or use another output")
        rows = pa.ipc.open_file(pa.py_buffer(data)).read_all()
        return cls({name: rows[name].combine_chunks().to_numpy() for name in _COLUMNS}, facts.unpinned)

    def _pinned(self, name: int) -> State | None:
        names = self.table["name"]
        place = int(np.searchsorted(names, np.uint64(name)))
        if place == len(names) or int(names[place]) != name:
            return None
        return State(int(self.table["size"][place]), int(self.table["stamp"][place]))

    def _bytes(self) -> memoryview:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, PIN_SCHEMA) as writer:
            writer.write_table(pa.table(self.table, schema=PIN_SCHEMA))
        return memoryview(sink.getvalue())


def image_hash(root: str, image: str) -> int:
    """What stands for an image in the table: 64 bits of its root, as the source has it, and its plain path below."""
    # The name of a file may be no UTF-8, which Python holds as halves of surrogate pairs. No row can name it.
    return xxhash.xxh3_64_intdigest(f"{root}\0{image}".encode("utf-8", "surrogatepass"))
