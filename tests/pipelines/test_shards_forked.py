"""A process that is forked while its parent reads, as a DataLoader's workers are, reads too."""

from __future__ import annotations

import fcntl
import gc
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from fsspec import asyn
from s3fs import S3FileSystem

from pipelines import storage
from pipelines.shards import ShardedDataset, reader
from pipelines.shards.cache import ShardCache
from pipelines.storage import stores
from tests.shards import write_dataset

PATIENCE_S = 30


@contextmanager
def begun_by_a_thread(work: Callable[[Callable[[], None]], object]) -> Iterator[threading.Event]:
    """`work` in a thread, at the place where it calls what it is given; it goes on when the event is set."""
    begun, go_on = threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert go_on.wait(PATIENCE_S)

    thread = threading.Thread(target=work, args=(wait,), daemon=True)
    thread.start()
    assert begun.wait(PATIENCE_S)
    yield go_on
    go_on.set()
    thread.join(PATIENCE_S)


@contextmanager
def forked(work: Callable[[], object]) -> Iterator[None]:
    """`work` in a process that is forked at once, and must come to its end once the block is left."""
    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    try:
        yield
        process.join(PATIENCE_S)
        assert process.exitcode == 0, "it hangs" if process.exitcode is None else "it failed"
    finally:
        process.kill()


def test_it_waits_for_a_shard_that_its_parent_fetches_and_not_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, waits = ShardCache(str(tmp_path), 100), multiprocessing.get_context("fork").Event()

    def get(before: Callable[[], None] = lambda: None) -> None:
        def fetch(path: Path) -> None:
            before()
            path.write_bytes(b"shard")

        cache.get("ab", 5, fetch)

    def get_in_child() -> None:
        flock = fcntl.flock

        def locking(*lock: Any) -> None:
            waits.set()
            flock(*lock)

        monkeypatch.setattr(fcntl, "flock", locking)
        get()

    with begun_by_a_thread(get) as go_on, forked(get_in_child):
        assert waits.wait(PATIENCE_S)
        go_on.set()
    assert [path.name for path in tmp_path.iterdir()] == ["ab.arrow"]


def test_it_opens_a_shard_that_its_parent_is_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    samples = write_dataset(str(tmp_path))
    dataset, parent, check_size = ShardedDataset(str(tmp_path)), os.getpid(), reader.check_size
    assert dataset.read(9)["key"] == samples[9]["key"]

    def read(before: Callable[[], None] = lambda: None) -> None:
        def checking(*shard: Any) -> None:
            if os.getpid() == parent:
                before()
            check_size(*shard)

        if os.getpid() == parent:
            monkeypatch.setattr(reader, "check_size", checking)
        assert [dataset.read(index)["key"] for index in (0, 9)] == [samples[index]["key"] for index in (0, 9)]

    with begun_by_a_thread(read), forked(read):
        pass


@pytest.mark.s3
def test_it_leaves_its_parent_the_connections_to_the_store(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    once = {"read_timeout": 10, "retries": {"total_max_attempts": 1}}  # who waits in vain fails
    options = stores._S3_OPTIONS
    monkeypatch.setitem(options, "config_kwargs", options["config_kwargs"] | once)
    uri = storage.join(s3_uri, "object")
    storage.write_bytes(uri, b"data")

    async def collect() -> None:
        gc.collect()

    def read() -> None:
        storage.read_bytes(uri)
        asyn.sync(asyn.get_loop(), collect)  # where Python itself collects while much is read

    for _ in range(2):
        with forked(read):
            pass
        assert storage.read_bytes(uri) == b"data"
    assert "Traceback" not in capfd.readouterr().err
    S3FileSystem.clear_instance_cache()
