"""Garbage collection: what killed runs have left in a prepared folder, and neither a receipt nor the manifest names.

A run that is killed may leave shards without a receipt, shared images that no row names and, on a disk, half-written
temporary files. No reader opens them, they only take room.

What is garbage is only certain once the manifest is there: until then a worker may have written a shard a moment ago
whose receipt is still on its way. So an unfinished folder is refused, unless an age is given, and then nothing younger
than that goes.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa
from fsspec import AbstractFileSystem

from pipelines import storage
from pipelines.preparation.image_pins import PIN_FOLDER
from pipelines.preparation.plan import MISSING_PLAN, PLAN_NAME, load_plan
from pipelines.shards.images import IMAGE_FOLDER, IMAGE_PATH, image_keys, image_name
from pipelines.shards.manifest import MANIFEST_NAME, Manifest
from pipelines.shards.receipts import RECEIPT_FOLDER, Receipt, load_receipts
from pipelines.shards.writer import SHARD_FOLDER

# Only what bears a name that we give is ours: an output may lie where its user keeps other things, images above all.
_SHARD_OR_PINS = re.compile(rf"({SHARD_FOLDER}|{PIN_FOLDER})/[0-9a-f]{{64}}\.arrow")
# What `storage` writes beside the place of a file.
_TEMPORARY = re.compile(
    rf"(({SHARD_FOLDER}|{PIN_FOLDER}|{RECEIPT_FOLDER}|{IMAGE_FOLDER}/[0-9a-f]{{2}})/)?\.[^/]+\.[0-9a-f]{{32}}\.part"
)


class CollectionError(ValueError):
    """Nothing may be removed here; the message says why and what helps."""


@dataclass(frozen=True)
class Garbage:
    """An object of a prepared folder that neither a receipt nor the manifest names."""

    path: str
    bytes: int
    age_hours: float
    """Since it was last written."""


def find_garbage(folder: str, older_than_hours: float | None = None) -> list[Garbage]:
    """What could be removed from `folder`, largest first.

    Args:
        folder: where `jobs/prepare.py` wrote; a local path or any URI of fsspec.
        older_than_hours: only what was written before; needed where the preparation has not finished, and then shared
            images stay in any case.

    Raises:
        CollectionError: nothing was prepared here, or it has not finished and no age is given.
        StoredModelError, ManifestError: a receipt, the plan or the manifest is damaged, so what it names is not known.
    """
    is_finished = storage.exists(storage.join(folder, MANIFEST_NAME))
    if not storage.exists(storage.join(folder, PLAN_NAME)):
        told = f"but a {MANIFEST_NAME}: {MISSING_PLAN}" if is_finished else "so nothing was prepared into it"
        raise CollectionError(f"{folder}: no {PLAN_NAME} here, {told}; nothing is removed")
    if older_than_hours is None and not is_finished:
        raise CollectionError(
            f"{folder}: the preparation has not finished, and a shard without a receipt may be one that a worker has "
            "just written. Run the preparation to its end first; or, where no driver is running, say with --older-than "
            "from how many hours on a leftover is garbage"
        )
    file_system, root = storage.filesystem(folder)
    now = time.time()
    # Listed before the receipts are read: what is committed in between is then seen as named.
    listed = list(_leftovers(file_system, root, now))
    named = _named(folder, is_finished)
    shared = {path for path in (_below(root, each.path) for each in listed) if path.startswith(f"{IMAGE_FOLDER}/")}
    if shared:
        # However old: a worker that finds an image here writes a row that names it, and not the image again.
        named |= _named_images(folder, named) if is_finished else shared
    if any(_below(root, each.path).startswith(f"{PIN_FOLDER}/") for each in listed):
        plan = load_plan(folder)
        named |= {plan.pins.name} if plan and plan.pins else set()
    found = [
        each
        for each in listed
        if _below(root, each.path) not in named and (older_than_hours is None or each.age_hours >= older_than_hours)
    ]
    return sorted(found, key=lambda each: (-each.bytes, each.path))


def remove(folder: str, garbage: list[Garbage]) -> list[Garbage]:
    """Remove `garbage` of `folder`; returns what was removed.

    An object that was written again since it was listed stays: a driver has come to need it.
    """
    file_system, _ = storage.filesystem(folder)
    removed = []
    for each in garbage:
        try:
            age_hours = (time.time() - _written_at(file_system.info(each.path))) / 3600
        except FileNotFoundError:
            continue  # another collection was quicker
        if age_hours >= each.age_hours:
            file_system.rm_file(each.path)
            removed.append(each)
    return removed


def _leftovers(file_system: AbstractFileSystem, root: str, now: float) -> Iterator[Garbage]:
    """Every shard, shared image and table of pins, named or not, and every temporary file."""
    for path, facts in file_system.find(root, detail=True).items():
        name = _below(root, path)
        if any(shape.fullmatch(name) for shape in (_SHARD_OR_PINS, IMAGE_PATH, _TEMPORARY)):
            yield Garbage(path, facts["size"], (now - _written_at(facts)) / 3600)


def _below(root: str, path: str) -> str:
    return path.removeprefix(root).lstrip("/")


def _named(folder: str, is_finished: bool) -> set[str]:
    """Paths, below `folder`, of the shards that receipts name, or the manifest: a receipt may have got lost since."""
    named = {receipt.shard.name for receipt in load_receipts(Receipt, folder) if receipt.shard}
    return named | ({shard.name for shard in Manifest.load(folder).shards} if is_finished else set())


def _named_images(folder: str, shards: set[str]) -> set[str]:
    """Paths, below `folder`, of the shared images that the rows of `shards` name."""
    keys: set[str] = set()
    for name in shards:
        keys |= image_keys(pa.ipc.open_file(pa.py_buffer(storage.read_bytes(storage.join(folder, name)))))
    return {image_name(key) for key in keys}


def _written_at(facts: dict[str, Any]) -> float:
    stamp = facts["mtime"] if "mtime" in facts else facts["LastModified"]
    return stamp.timestamp() if isinstance(stamp, datetime) else float(stamp)
