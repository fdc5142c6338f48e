"""Kills under Ray: a worker amid a chunk, the raylet of a node, the driver at a step. The manifest stays the same."""

from __future__ import annotations

import signal
from pathlib import Path

import psutil
import pytest
import ray
import ray.cluster_utils

from pipelines import storage
from pipelines.prepare import prepare
from pipelines.shards import Manifest, ShardedDataset
from tests.corpus import row, write_corpus, write_processor
from tests.fixtures.ray_session import SMALL_STORE
from tests.kills import Blocked, start_driver, wait
from tests.preparation import prepare_here, prepare_settings

pytestmark = pytest.mark.ray

NUM_ROWS = 24
UNPINNED = {"pin_images": False}  # a pipe in the place of an image is not what a plan has seen, and should not be


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Six chunks of four rows."""
    write_corpus(tmp_path, [row(number) for number in range(NUM_ROWS)])
    write_processor(tmp_path)
    return tmp_path


def num_receipts(output: str) -> int:
    return sum(name.endswith(".json") for name in storage.list_names(storage.join(output, "receipts")))


def busy_workers(raylet: psutil.Process) -> list[psutil.Process]:
    """Workers that carry out a chunk at this moment: Ray says so in their title."""
    found = []
    for process in raylet.children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith("ray::MapBatches"):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def check(output: str, expected: Manifest) -> None:
    assert Manifest.load(output) == expected
    dataset = ShardedDataset(output)
    assert [dataset.read(index)["key"] for index in range(len(dataset))] == [f"corpus:{n}" for n in range(NUM_ROWS)]


@pytest.mark.usefixtures("ray_session")
def test_worker_killed_amid_a_chunk_costs_that_chunk(corpus: Path) -> None:
    settings = prepare_settings(corpus, **UNPINNED)
    expected = prepare_here(prepare_settings(corpus, output=str(corpus / "undisturbed"), **UNPINNED))
    image = Blocked(corpus / "images" / "13.jpg", 13)
    driver = start_driver("prepare", settings, corpus, ray.get_runtime_context().gcs_address)
    try:
        wait(lambda: num_receipts(settings.output) == 5, "all chunks but the one with the image that waits")
        [worker] = wait(lambda: busy_workers(psutil.Process()), "a worker that waits for the image")
        image.release()
        worker.kill()
        out, _ = driver.communicate(timeout=90)
    finally:
        driver.kill()
    assert driver.returncode == 0, out
    check(settings.output, expected)
    assert len(storage.list_names(f"{settings.output}/shards")) == 6


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("kill", [("receipts/", "after"), (r"manifest\.json", "before")])
def test_killed_driver_costs_at_most_a_chunk_per_worker(corpus: Path, kill: tuple[str, str]) -> None:
    """Two drivers die at one step, on one output; a third finishes."""
    settings = prepare_settings(corpus)
    expected = prepare_here(prepare_settings(corpus, output=str(corpus / "undisturbed")))
    address = ray.get_runtime_context().gcs_address
    drivers = [start_driver("prepare", settings, corpus, address, *kill) for _ in range(2)]
    for driver in drivers:
        out, _ = driver.communicate(timeout=120)
        assert driver.returncode == -signal.SIGKILL, out
    assert not storage.exists(f"{settings.output}/manifest.json")
    receipts = num_receipts(settings.output)
    assert receipts == (6 if kill[0].startswith("manifest") else receipts) > 0
    kept = {path: path.stat().st_mtime_ns for path in Path(settings.output, "receipts").glob("*.json")}
    assert prepare(settings) == expected
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    check(settings.output, expected)


def test_raylet_killed_amid_chunks_costs_those_chunks(corpus: Path, two_nodes: ray.cluster_utils.Cluster) -> None:
    settings = prepare_settings(corpus, **UNPINNED)
    expected = prepare_here(prepare_settings(corpus, output=str(corpus / "undisturbed"), **UNPINNED))
    images = [Blocked(corpus / "images" / f"{number}.jpg", number) for number in (12, 17)]  # two chunks, for two CPUs
    [node] = two_nodes.worker_nodes
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    driver = start_driver("prepare", settings, corpus, two_nodes.address)
    try:
        wait(lambda: len(busy_workers(raylet)) == 2 and num_receipts(settings.output) >= 3, "two workers that wait")
        workers = busy_workers(raylet)
        for image in images:
            image.release()
        raylet.kill()
        for worker in workers:  # a worker that loses its raylet ends by itself, but not while it waits for a pipe
            worker.kill()
        two_nodes.add_node(num_cpus=2, object_store_memory=SMALL_STORE)
        out, _ = driver.communicate(timeout=120)
    finally:
        driver.kill()
    assert driver.returncode == 0, out
    check(settings.output, expected)
