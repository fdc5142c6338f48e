"""What is needed beside a DataLoader for its batches to be kept: Arrow files of a few batches each, and their hashes.

Written as one would for oneself, with pyarrow and nothing of this project: no receipts, nothing to resume from, no wait
for the disk. Rows stay padded, as they are handed over.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import closing
from itertools import chain, islice
from pathlib import Path

import numpy as np
import pyarrow as pa
from torch import Tensor

BATCHES_PER_FILE = 4
"""Of 32 rows: about as many rows as a shard of a preparation has."""


def write_batches(batches: Iterable[Mapping[str, Tensor]], folder: Path) -> dict[str, str]:
    """Write `batches` (as `collate` makes them, with an image in every row) below `folder`.

    Returns:
        Name of each file -> its sha256, which are also written, last, as `index.json`.
    """
    folder.mkdir(parents=True)
    hashes: dict[str, str] = {}
    waiting = iter(batches)
    for first in waiting:
        name = f"{len(hashes):06d}.arrow"
        hashes[name] = _write(chain([first], islice(waiting, BATCHES_PER_FILE - 1)), folder / name)
    (folder / "index.json").write_text(json.dumps(hashes))
    return hashes


def _write(batches: Iterable[Mapping[str, Tensor]], path: Path) -> str:
    records = map(_record_batch, batches)
    first = next(records)
    with closing(_HashedFile(path)) as file, pa.ipc.new_file(file, first.schema) as writer:
        for record in chain([first], records):
            writer.write_batch(record)
    return file.digest.hexdigest()


def _record_batch(batch: Mapping[str, Tensor]) -> pa.RecordBatch:
    arrays = {name: _lists(tensor.numpy()) for name, tensor in batch.items() if name != "pixel_values"}
    pixels = batch["pixel_values"].numpy()
    kind = pa.binary(pixels[0].nbytes)
    arrays["pixel_values"] = pa.Array.from_buffers(kind, len(pixels), [None, pa.py_buffer(pixels)])
    return pa.record_batch(arrays)


def _lists(table: np.ndarray) -> pa.ListArray:
    offsets = np.arange(0, table.size + 1, table.shape[1], dtype=np.int32)
    return pa.ListArray.from_arrays(offsets, table.ravel())


class _HashedFile:
    """A file that hashes what is written to it."""

    closed = False

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self.digest = hashlib.sha256()

    def write(self, data: pa.Buffer) -> int:
        self.digest.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        """All is handed to the system at once."""

    def close(self) -> None:
        self._file.close()
