"""Kills under Ray: a worker amid a chunk, the raylet of a node, the driver at a step. The manifest stays the same."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pytest
import ray
import ray.cluster_utils

from pipelines import storage
from pipelines.preparation import chain
from pipelines.preparation.chain import FeatureActor, run_chunks
from pipelines.preparation.processor import load_processor
from pipelines.preparation.row_images import source_files
from pipelines.prepare import prepare
from pipelines.ray_tasks import CrashError
from pipelines.shards import Manifest, ShardedDataset
from tests.corpus import row, write_corpus, write_processor
from tests.fixtures.ray_session import SMALL_STORE
from tests.kills import Blocked, start_driver, wait
from tests.preparation import begin, prepare_here, prepare_settings

pytestmark = pytest.mark.ray

NUM_ROWS = 12
UNPINNED = {"pin_images": False}  # a pipe in the place of an image is not what a plan has seen, and should not be


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Three chunks of four rows: each worker that starts for one imports the model's libraries first."""
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


def check_kept(receipts: dict[Path, int]) -> None:
    """They are as they were: what they tell of was not done again."""
    assert {path: path.stat().st_mtime_ns for path in receipts} == receipts


def check(output: str, expected: Manifest) -> None:
    assert Manifest.load(output) == expected
    dataset = ShardedDataset(output)
    assert [dataset.read(index)["key"] for index in range(len(dataset))] == [f"corpus:{n}" for n in range(NUM_ROWS)]


@pytest.mark.usefixtures("ray_session")
def test_worker_killed_amid_a_chunk_costs_that_chunk(corpus: Path) -> None:
    settings = prepare_settings(corpus, **UNPINNED)
    expected = prepare_here(prepare_settings(corpus, output=str(corpus / "undisturbed"), **UNPINNED))
    image = Blocked(corpus / "images" / "9.jpg", 9)
    with ThreadPoolExecutor(1) as driver:
        done = driver.submit(prepare, settings)
        try:
            wait(lambda: num_receipts(settings.output) == 2, "all chunks but the one with the image that waits")
            [_] = wait(lambda: busy_workers(psutil.Process()), "a worker that waits for the image")
        finally:
            image.release()
            for worker in busy_workers(psutil.Process()):
                worker.kill()
        assert done.result(timeout=90) == expected
    check(settings.output, expected)
    assert len(storage.list_names(f"{settings.output}/shards")) == 3


@pytest.mark.usefixtures("ray_session")
def test_killed_driver_costs_at_most_a_chunk_per_worker(corpus: Path) -> None:
    """Two drivers die at their first receipts, on one output, the next one before the manifest; another finishes."""
    settings = prepare_settings(corpus)
    expected = prepare_here(prepare_settings(corpus, output=str(corpus / "undisturbed")))
    address = ray.get_runtime_context().gcs_address
    kept: dict[Path, int] = {}
    for count, kill in ((2, ("receipts/", "after")), (1, (r"manifest\.json", "before"))):
        for driver in [start_driver("prepare", settings, corpus, address, *kill) for _ in range(count)]:
            out, _ = driver.communicate(timeout=120)
            assert driver.returncode == -signal.SIGKILL, out
        assert not storage.exists(f"{settings.output}/manifest.json")
        check_kept(kept)
        kept = {path: path.stat().st_mtime_ns for path in Path(settings.output, "receipts").glob("*.json")}
        assert 0 < len(kept) < 3 if count == 2 else len(kept) == 3
    assert prepare(settings) == expected
    check_kept(kept)
    check(settings.output, expected)


def test_raylet_killed_amid_chunks_costs_those_chunks(corpus: Path, two_nodes: ray.cluster_utils.Cluster) -> None:
    settings = prepare_settings(corpus, **UNPINNED)
    expected = prepare_here(prepare_settings(corpus, output=str(corpus / "undisturbed"), **UNPINNED))
    images = [Blocked(corpus / "images" / f"{number}.jpg", number) for number in (4, 9)]  # two chunks, for two CPUs
    [node] = two_nodes.worker_nodes
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    driver = start_driver("prepare", settings, corpus, two_nodes.address)
    try:
        wait(lambda: len(busy_workers(raylet)) == 2 and num_receipts(settings.output) == 1, "two workers that wait")
        workers = busy_workers(raylet)
        for image in images:
            image.release()
        raylet.kill()
        for worker in workers:  # a worker that loses its raylet ends by itself, but not while it waits for a pipe
            worker.kill()
        two_nodes.add_node(num_cpus=1, object_store_memory=SMALL_STORE)
        out, _ = driver.communicate(timeout=120)
    finally:
        driver.kill()
    assert driver.returncode == 0, out
    check(settings.output, expected)


@pytest.mark.usefixtures("ray_session")
def test_a_row_that_kills_its_worker_ends_the_run_and_is_named(corpus: Path) -> None:
    settings = prepare_settings(corpus, sources=[{"path": str(corpus / "corpus.jsonl"), "image_root": str(corpus)}])
    ledger, _ = begin(settings)
    processor = load_processor(settings)
    encode = processor.encode

    def deadly(messages: Any, *args: Any, **kwargs: Any) -> Any:
        if messages[3]["content"] == row(6)["conversations"][3]["value"]:
            os._exit(139)  # as after a segmentation fault
        return encode(messages, *args, **kwargs)

    processor.encode = deadly
    files = source_files(ledger.plan.terms.sources)
    run = run_chunks(ledger.plan, ledger.pending, files, settings.output, processor, None, None)
    named = (
        r"source 'corpus': .*corpus\.jsonl: workers die of chunk 1, 4 rows from row 4 \(line 5\) on\..*chunk_rows: 1"
    )
    with pytest.raises(CrashError, match=named):
        for receipt in run:
            ledger.commit(receipt)
    assert 1 not in ledger.receipts


@pytest.mark.usefixtures("ray_session")
def test_a_chunk_that_kills_who_holds_the_tower_is_named(
    corpus: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deadly(FeatureActor):
        def __call__(self, samples: pa.Table) -> pa.Table:
            if "corpus:6" in samples["key"].to_pylist():
                os._exit(139)
            return super().__call__(samples)

    monkeypatch.setattr(chain, "FeatureActor", Deadly)
    sources = [{"path": str(corpus / "corpus.jsonl"), "image_root": str(corpus)}]
    encoder = {"path": str(tiny_checkpoint), "min_workers": 1, "max_workers": 1}
    settings = prepare_settings(corpus, sources=sources, payload="features", encoder=encoder)
    ledger, _ = begin(settings)
    files = source_files(ledger.plan.terms.sources)
    processor = load_processor(settings)
    run = run_chunks(ledger.plan, ledger.pending, files, settings.output, processor, settings.encoder, None)
    with pytest.raises(
        CrashError, match=r"source 'corpus': .*corpus\.jsonl: workers die of chunk 1, 4 rows from row 4"
    ):
        list(run)
