"""Reading rows for training: this project's shards, MDS and WebDataset tars that hold the same samples.

Every reader runs in the workers of a PyTorch DataLoader, which hand over sizes alone: what is measured is reading, not
the way from a worker to the trainer, which is the same for all. A row is read when its arrays are in memory.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, IterableDataset

from pipelines import storage
from pipelines.benchmarks import rivals
from pipelines.benchmarks.rivals import is_installed, num_bytes, read_tars, streaming, write_mds, write_tars
from pipelines.benchmarks.rounds import Figures
from pipelines.shards.reader import ShardedDataset

OURS, MDS, MDS_ROWS, TARS = "shards", "MDS", "MDS by index", "WebDataset"
"""MDS: Streaming's own iterator, which fetches ahead and reads in its order alone."""
_BATCH = 16
_URL_SECONDS = 3600


@dataclass(frozen=True)
class Copies:
    """The same samples in every format that can be read here."""

    shards: str
    """Folder or URI, as for the rivals; None where a rival is not installed."""
    mds: str | None
    tars: str | None
    num_rows: int

    def contestants(self, is_random: bool) -> list[str]:
        """Who can read the rows at random, or in sequence."""
        by_index = [OURS, *([MDS_ROWS] if self.mds else [])]
        return by_index if is_random else [*by_index, *([MDS] if self.mds else []), *([TARS] if self.tars else [])]

    @property
    def is_local(self) -> bool:
        """Whether they lie on this machine."""
        return storage.is_local(self.shards)


class _Stream(IterableDataset[tuple[int, int]]):
    """Any reader with an order of its own, as sizes."""

    def __init__(self, samples: Iterable[dict[str, Any]]) -> None:
        self._samples = samples

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((1, num_bytes(sample)) for sample in self._samples)


class _Rows(Dataset[tuple[int, int]]):
    """Any reader of single rows, as sizes."""

    def __init__(self, read: Any) -> None:
        self._read = read

    def __getitem__(self, row: int) -> tuple[int, int]:
        return 1, num_bytes(self._read(row))


def write_copies(shards: str, folder: str) -> Copies:
    """Write the dataset in `shards` anew below `folder` (local or a URI), once for every rival that is installed."""
    dataset = ShardedDataset(shards, cache_bytes=0)
    with tempfile.TemporaryDirectory() as scratch:
        here = Path(folder) if storage.is_local(folder) else Path(scratch)
        mds = storage.join(folder, "mds") if is_installed("streaming") else None
        tars = storage.join(folder, "tars") if is_installed("webdataset") else None
        if mds:
            shutil.rmtree(here / "mds", ignore_errors=True)
            write_mds(dataset, here / "mds")
        if tars:
            write_tars(dataset, here / "tars")
        if not storage.is_local(folder):
            for path in (path for path in here.rglob("*") if path.is_file()):
                storage.write_bytes(storage.join(folder, str(path.relative_to(here))), path.read_bytes())
    return Copies(shards, mds, tars, len(dataset))


def read_all(copies: Copies, contestant: str, is_random: bool, num_workers: int, seed: int) -> Figures:
    """Read every row once; with an empty cache, where there is one.

    The clock starts with the first batch of files on this machine. Of a store it starts before, since the first batch
    may bring much of what the others are read from.

    Args:
        copies: what to read.
        contestant: one of those that `copies` has for this order.
        is_random: the rows one by one in an order drawn by `seed`; else from the first to the last.
        num_workers: processes that read.
        seed: of the order.
    """
    order = np.arange(copies.num_rows)
    if is_random:
        np.random.default_rng(seed).shuffle(order)
    with tempfile.TemporaryDirectory() as cache:
        dataset: Dataset[tuple[int, int]]
        if contestant == OURS:
            dataset = _Rows(ShardedDataset(copies.shards, cache_dir=cache).read)
        elif contestant == MDS_ROWS and copies.is_local:
            dataset = _Rows(streaming().LocalDataset(copies.mds).__getitem__)
        elif contestant == MDS_ROWS:
            dataset = _Rows(_mds(str(copies.mds), cache).__getitem__)
        elif contestant == MDS:
            dataset = _Stream(_mds(str(copies.mds), cache))
        else:
            dataset = _Stream(read_tars(_tar_urls(str(copies.tars))))
        rows = None if isinstance(dataset, IterableDataset) else order.tolist()
        return _measured(dataset, rows, num_workers, copies.is_local)


def _measured(
    dataset: Dataset[tuple[int, int]], order: Sequence[int] | None, num_workers: int, skips_start: bool
) -> Figures:
    batches: Iterable[tuple[int, int]] = DataLoader(
        dataset, batch_size=_BATCH, sampler=order, num_workers=num_workers, collate_fn=_total
    )
    rows, size, start = 0, 0, time.perf_counter()
    for number, (some, some_bytes) in enumerate(batches):
        if number == 0 and skips_start:
            start = time.perf_counter()
            continue
        rows, size = rows + some, size + some_bytes
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "rows": rows, "rows_per_s": rows / seconds, "mb_per_s": size / seconds / 1e6}


def _total(sizes: list[tuple[int, int]]) -> tuple[int, int]:
    rows, size = zip(*sizes, strict=True)
    return sum(rows), sum(size)


def _mds(folder: str, cache: str) -> Any:
    streaming()  # before its submodules
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    if storage.is_local(folder):
        return streaming().StreamingDataset(local=folder, batch_size=_BATCH, shuffle=False)
    os.environ.setdefault("S3_ENDPOINT_URL", os.environ.get("AWS_ENDPOINT_URL", "https://s3.amazonaws.com"))
    dataset = streaming().StreamingDataset(remote=folder, local=cache, batch_size=_BATCH, shuffle=False)
    for stream in dataset.streams:
        stream._downloader.clean_up()  # else forked workers share one connection, and read each other's answers
    return dataset


def _tar_urls(folder: str) -> list[str]:
    names = [name for name in storage.list_names(folder) if name.endswith(".tar")]
    if storage.is_local(folder):
        return [storage.join(folder, name) for name in names]
    file_system, path = storage.filesystem(folder)
    signed = (file_system.sign(f"{path}/{name}", expiration=_URL_SECONDS) for name in names)
    return [f"pipe:curl -s -f '{url}'" for url in signed]


def missing() -> list[str]:
    """One line for each rival that is not installed here."""
    absent = [package for package in ("streaming", "webdataset") if not is_installed(package)]
    return [f"Not compared, because not installed: {', '.join(absent)}. {rivals.INSTALL}"] if absent else []
