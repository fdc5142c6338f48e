"""Shards of an object store: fetched once into a cache, ahead of who reads, or read row by row where none is."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader, Dataset

from pipelines import storage
from pipelines.shards import Manifest, ShardedDataset, ShardError
from pipelines.shards.cache import ShardCache
from tests.shards import write_dataset


@pytest.mark.s3
def test_dataset_on_s3_is_fetched_once_and_checked(s3_uri: str, tmp_path: Path) -> None:
    samples = write_dataset(s3_uri)
    dataset = ShardedDataset(s3_uri, cache_dir=str(tmp_path))
    assert [dataset.read(index)["key"] for index in range(10)] == [row["key"] for row in samples]
    cached = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(cached) == 3
    first = dataset.manifest.shards[0]
    storage.write_bytes(storage.join(s3_uri, first.name), b"x" * first.bytes)
    assert ShardedDataset(s3_uri, cache_dir=str(tmp_path)).read(0)["key"] == "corpus:0"  # from the cache
    with pytest.raises(ShardError, match=f"{first.name}: expected {first.bytes} bytes with sha256 {first.sha256}"):
        ShardedDataset(s3_uri, cache_dir=str(tmp_path / "empty")).read(0)
    assert not any((tmp_path / "empty").rglob(f"*{first.sha256}*"))


def test_parts_of_processes_that_were_killed_leave_the_cache(tmp_path: Path) -> None:
    old, young = (tmp_path / f".{number:064d}.arrow.0.part" for number in range(2))
    for part in (old, young):
        part.write_bytes(b"x")
    an_hour_ago = time.time() - 3601
    os.utime(old, (an_hour_ago, an_hour_ago))
    ShardCache(str(tmp_path), 100).get("2" * 64, 1, lambda path: path.write_bytes(b"x") and None)
    assert (old.exists(), young.exists()) == (False, True)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is read of the store: (kind, bytes), while the real functions do the reading."""
    seen: list[tuple[str, int]] = []

    def watch(kind: str, read: Callable[..., bytes]) -> Callable[..., bytes]:
        def reading(*args: Any) -> bytes:
            data = read(*args)
            seen.append((kind, len(data)))
            return data

        return reading

    def downloading(uri: str, path: Path) -> None:
        download(uri, path)
        seen.append(("download", path.stat().st_size))

    download = storage.download
    monkeypatch.setattr(storage, "download", downloading)
    for kind in ("read_bytes", "read_range"):
        monkeypatch.setattr(storage, kind, watch(kind, getattr(storage, kind)))
    return seen


@pytest.mark.s3
@pytest.mark.parametrize("payload", ["original", "pixels", "features"])
def test_without_a_cache_a_row_is_one_ranged_get(
    s3_uri: str, tmp_path: Path, payload: str, fetched: list[tuple[str, int]]
) -> None:
    samples = write_dataset(s3_uri, payload)
    dataset = ShardedDataset(s3_uri, cache_dir=str(tmp_path), cache_bytes=0)
    cached = ShardedDataset(s3_uri, cache_dir=str(tmp_path / "cache"))
    fetched.clear()
    rows = [dataset.read(index) for index in range(len(samples))]
    assert [kind for kind, _ in fetched] == ["read_range"] * len(samples)
    assert not any(tmp_path.iterdir())
    for index, row in enumerate(rows):
        same = cached.read(index)
        assert row.keys() == same.keys()
        for name, value in row.items():
            assert np.array_equal(value, same[name]), name


@pytest.mark.s3
def test_a_cache_too_small_for_all_keeps_what_fits_and_reads_the_rest_by_ranges(
    s3_uri: str, tmp_path: Path, fetched: list[tuple[str, int]]
) -> None:
    samples = write_dataset(s3_uri)
    sizes = [shard.bytes for shard in Manifest.load(s3_uri).shards]
    dataset = ShardedDataset(s3_uri, cache_dir=str(tmp_path), cache_bytes=sizes[0] + sizes[1])
    fetched.clear()
    for _ in range(2):
        assert [dataset.read(index)["key"] for index in range(10)] == [row["key"] for row in samples]
    assert sorted(size for kind, size in fetched if kind == "download") == sorted(sizes[:2])
    assert sum(kind == "read_range" for kind, _ in fetched) == 2 * 2  # two rows of the third shard, each time
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= sizes[0] + sizes[1]


@pytest.mark.s3
def test_the_next_shards_come_while_one_is_read(s3_uri: str, tmp_path: Path) -> None:
    """And what is wrong with one of them is told to whoever reads it."""
    write_dataset(s3_uri)
    dataset = ShardedDataset(s3_uri, cache_dir=str(tmp_path))
    names = [f"{shard.sha256}.arrow" for shard in dataset.manifest.shards]
    storage.write_bytes(storage.join(s3_uri, dataset.manifest.shards[1].name), b"")
    assert dataset.read(0)["key"] == "corpus:0"
    deadline = time.monotonic() + 30
    while not (tmp_path / names[2]).exists():
        assert time.monotonic() < deadline, "the shard after the next one has not come"
        time.sleep(0.01)
    with pytest.raises(ShardError, match=rf"{names[1]}: expected \d+ bytes with sha256 \w+, found 0 with "):
        dataset.read(5)
    assert dataset.read(9)["key"] == "corpus:9"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([names[0], names[2]])


@pytest.mark.s3
def test_a_forked_process_fetches_ahead_too(s3_uri: str, tmp_path: Path) -> None:
    samples = write_dataset(s3_uri, rows=40)
    dataset = ShardedDataset(s3_uri, cache_dir=str(tmp_path))
    dataset.read(0)
    workers = DataLoader(Keys(dataset), batch_size=4, num_workers=2, multiprocessing_context="fork")
    assert [key for keys in workers for key in keys] == [row["key"] for row in samples]
    assert len(list(tmp_path.iterdir())) == 10


class Keys(Dataset[str]):
    """The keys of a dataset's rows, which are read for that."""

    def __init__(self, rows: ShardedDataset) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> str:
        return self._rows.read(row)["key"]


@pytest.mark.s3
def test_a_row_that_was_changed_is_named_and_its_neighbours_are_read(s3_uri: str) -> None:
    write_dataset(s3_uri)
    dataset = ShardedDataset(s3_uri, cache_bytes=0)
    entry = dataset.manifest.shards[1]
    data = bytearray(storage.read_bytes(storage.join(s3_uri, entry.name)))
    data[entry.row_offsets[2] - 20] ^= 1
    storage.write_bytes(storage.join(s3_uri, entry.name), bytes(data))
    with pytest.raises(ShardError, match=f"{entry.name}: row 1: expected .* bytes with XXH3 {entry.row_checksums[1]}"):
        dataset.read(5)
    assert [dataset.read(index)["key"] for index in (4, 6)] == ["corpus:4", "corpus:6"]
    storage.write_bytes(storage.join(s3_uri, entry.name), bytes(data[: entry.row_offsets[3] + 8]))
    with pytest.raises(ShardError, match=r"row 3: expected \d+ bytes .* found 8 with"):
        dataset.read(7)


def test_cache_keeps_within_its_bound(tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), max_bytes=250)
    fetched: list[str] = []

    def get(name: str) -> bytes:
        def fetch(path: Path) -> None:
            fetched.append(name)
            path.write_bytes(name.encode() * 100)

        return cache.get(name, 100, fetch).read_bytes()

    for name in ("a", "b", "a", "c"):  # c takes the place of b, the least recently used
        assert get(name) == name.encode() * 100
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "c"]
    get("a")
    get("b")
    assert fetched == ["a", "b", "c", "b"]
