"""The plan: what will be prepared, from what, by what, in which chunks. Everything that decides a byte is in it.

A folder holds the work of one plan. Whoever comes later with other terms is told which, and writes nothing.

Its inputs are pinned: the files of the corpora, with the images that lie in them (parquet, webdataset), by fingerprints
in the terms; images that rows name by their paths by a table beside the plan (`image_pins`). What is read in another
state, by a resumed run too, ends the work with an error that names it.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from itertools import count, groupby, islice
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from pipelines import storage
from pipelines.preparation.chunks import Chunk
from pipelines.preparation.image_pins import ImagePins, PinFacts
from pipelines.preparation.sources import (
    PlanError,
    SourceTerms,
    is_taken,
    row_key,
    source_differences,
)
from pipelines.shards.manifest import Layout, Payload
from pipelines.stored_models import load_model

PLAN_NAME = "plan.json"
# Nothing is lost with a plan: its receipts name it by its hash, so they fit the same plan, made again, and no other.
_REMEDY = (
    "restore it, or choose another output. If it was cut or changed, it may also be removed: the job, run again as "
    "before, makes the same plan of the same inputs and keeps what is done"
)

MISSING_PLAN = "restore it, or run the job again as before: it makes the same plan of the same inputs, no chunk anew"
"""What helps where a finished dataset has lost its plan."""
_DIFFERENCES = 20  # that an error tells: a source may have ten thousand files


class SourcedTerms(BaseModel):
    """What decides the bytes of an output that is made of corpora."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sources: list[SourceTerms]

    def differences(self, other: SourcedTerms) -> list[str]:
        """One line per field in which `other` differs; files of sources go by their names."""
        mine, theirs = (dict(_flatten(terms.model_dump(exclude={"sources"}))) for terms in (self, other))
        fields = [field for field in {**mine, **theirs} if mine.get(field) != theirs.get(field)]
        lines = [f"{field}: was {mine.get(field)!r}, now {theirs.get(field)!r}" for field in fields]
        return [*source_differences(self.sources, other.sources), *lines]


class Terms(SourcedTerms):
    """All that decides what the dataset will hold."""

    layout: Layout
    payload: Payload
    max_length: int
    chunk_rows: int
    tiling: str
    num_image_tokens: int
    image_shape: list[int] | None
    """Shape of every stored array; None where images stay encoded."""
    image_dtype: str | None = None
    """Type of every stored array: uint8, float16, int8; None where images stay encoded."""
    share_images: bool = False
    pin_images: bool = False
    processor_identity: str
    encoder_identity: str | None
    code: str
    """The sha256 of our own code that decides a row."""
    libraries: dict[str, str] = Field(default_factory=dict)
    """Name -> version of those that make ids, pixels and features."""

    def identity_of_images(self) -> bytes:
        """A hash of all that decides what becomes of an image."""
        decide = {"payload", "tiling", "image_shape", "image_dtype", "processor_identity", "encoder_identity"}
        terms = self.model_dump(include=decide | {"code", "libraries"})
        return hashlib.sha256(json.dumps(terms, sort_keys=True).encode()).digest()


class CorpusPlan(BaseModel):
    """Terms and chunks. Equal inputs give an equal plan."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    terms: SourcedTerms
    chunks: list[Chunk]

    @property
    def num_rows(self) -> int:
        """Rows of all chunks."""
        return sum(chunk.rows for chunk in self.chunks)

    def describe(self, how: str) -> str:
        """A line for all, which says `how` as well, and one for each source."""
        rows: Counter[str] = Counter()
        for chunk in self.chunks:
            rows[self.terms.sources[chunk.source].corpus] += chunk.rows
        lines = [f"plan {self.identity()[:12]}: {self.num_rows:,} rows in {len(self.chunks):,} chunks, {how}"]
        for corpus, members in groupby(self.terms.sources, key=lambda source: source.corpus):
            first, *others = members
            lines.append(f"  {corpus}: {rows[corpus]:,} rows of {first.path}")
            lines[-1] += f" and {len(others):,} more files" if others else ""
        return "\n".join(lines)

    @classmethod
    def load(cls, output: str) -> Self | None:
        """The plan that the folder `output` belongs to; None in a folder without one.

        Raises:
            StoredModelError: it is damaged, or of another job.
        """
        try:
            return load_model(cls, storage.join(output, PLAN_NAME), "a plan of this job", _REMEDY)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def to_json(self) -> bytes:
        """The bytes that are stored."""
        return self.model_dump_json().encode()

    def identity(self) -> str:
        """The sha256 of the plan, which its receipts and its manifest carry."""
        return storage.sha256(self.to_json())

    def keys(self, chunk: Chunk) -> list[str]:
        """The keys of the rows of `chunk`, in order."""
        source = self.terms.sources[chunk.source]
        taken = (row for row in count(chunk.first_row) if is_taken(source, row, chunk.repeat))
        return [row_key(source.name, row, chunk.repeat) for row in islice(taken, chunk.rows)]


class Plan(CorpusPlan):
    """The plan of a preparation."""

    terms: Terms
    pins: PinFacts | None = None
    """Of the images that rows name; None where there are no such rows, or images may change."""

    def load_pins(self, output: str) -> ImagePins | None:
        """Its pins, from the folder `output`. Raises: as `ImagePins.load`."""
        return ImagePins.load(output, self.pins) if self.pins else None

    def describe(self, how: str) -> str:
        """As of any plan, with a line for the pins."""
        text = super().describe(how)
        if self.pins is None:
            return text
        there = self.pins.images - self.pins.absent
        text += f"\n  images that rows name: {there:,} pinned as they are"
        text += f", {self.pins.absent:,} not there" if self.pins.absent else ""
        unpinned = f", {self.pins.unpinned:,} not pinned (their folders may not be listed)"
        return text + (unpinned if self.pins.unpinned else "")


def check_terms(output: str, planned: SourcedTerms, now: SourcedTerms) -> None:
    """Raise PlanError with every field in which `now` differs from what the folder `output` was planned with."""
    differences = planned.differences(now)
    if len(differences) > _DIFFERENCES:
        differences = [*differences[:_DIFFERENCES], f"and {len(differences) - _DIFFERENCES:,} more"]
    if differences:
        raise PlanError(
            f"{output}: this folder was begun with other terms: {'; '.join(differences)}. "
            "Run it with the terms it was begun with, or choose another output"
        )


def load_plan(output: str) -> Plan | None:
    """As `CorpusPlan.load`, for a preparation."""
    return Plan.load(output)


def _flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield path, value
        return
    for name, part in items:
        yield from _flatten(part, f"{path}.{name}" if path else str(name))
