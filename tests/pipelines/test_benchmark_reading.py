"""Tests for pipelines/benchmarks/reading.py, preparing.py and the tables: whether they measure, never how fast."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from flashsloth import FlashSlothProcessor
from pipelines.benchmarks.data_tables import growth_table, preparing_table, reading_table
from pipelines.benchmarks.preparing import CheckedPhotos, LoaderContestant, Photos, bare_loop
from pipelines.benchmarks.processes import CpuMeter, machine_cpu_s, process_tree
from pipelines.benchmarks.reading import MDS, MDS_ROWS, OURS, TARS, read_all, write_copies
from pipelines.benchmarks.rounds import Rounds
from tests.corpus import write_corpus, write_processor
from tests.fixtures.tiny import build_processor
from tests.prepared import coloured_rows, write_prepared

NUM_ROWS = 40
_FIRST_BATCH = 16  # before the clock starts


@pytest.fixture(scope="module")
def processor() -> FlashSlothProcessor:
    return build_processor()


@pytest.mark.parametrize("name", [OURS, MDS_ROWS, MDS, TARS])
def test_every_reader_reads_every_row(tmp_path: Path, processor: FlashSlothProcessor, name: str) -> None:
    copies = write_copies(write_prepared(tmp_path / "shards", coloured_rows(NUM_ROWS), processor), str(tmp_path))
    if name not in copies.contestants(is_random=False):
        pytest.skip(f"{name} is not installed (the extra `bench`)")
    array_bytes = 3 * 126 * 126
    for is_random in (False, True):
        if name not in copies.contestants(is_random):
            continue
        figures = read_all(copies, name, is_random, num_workers=1, seed=0)
        assert figures["rows"] == NUM_ROWS - _FIRST_BATCH
        assert figures["mb_per_s"] * 1e6 > figures["rows_per_s"] * array_bytes


def test_the_loop_and_the_loader_make_every_row(tmp_path: Path) -> None:
    """Text-only rows are none of theirs: the photos' corpus has an image in each."""
    rows = write_corpus(tmp_path, 3)
    write_processor(tmp_path)
    photos, checked = Photos(tmp_path, rows), CheckedPhotos(tmp_path, rows)
    for figures in (bare_loop(photos), bare_loop(checked), LoaderContestant(photos, 1)()):
        assert figures["rows_per_s"] == pytest.approx(3 / figures["seconds"])
    for by_pillow, ours in zip(photos, checked, strict=True):
        assert by_pillow.keys() == ours.keys()
        for field, values in ours.items():
            np.testing.assert_array_equal(by_pillow[field], values)


def test_the_meter_counts_a_process_that_has_ended() -> None:
    work = "import time\nwhile time.process_time() < 1.5: pass"
    with CpuMeter() as meter:
        subprocess.run([sys.executable, "-c", work], check=True)
    assert meter.seconds > 0.4  # it is looked at once a second


def test_the_machine_is_at_least_as_busy_as_this_process() -> None:
    machine, own = machine_cpu_s(), time.process_time()
    while time.process_time() - own < 0.1:
        pass
    assert machine_cpu_s() - machine > 0.05  # it counts in hundredths


def test_this_process_is_the_first_of_its_tree() -> None:
    first = process_tree()[0]
    assert first.cpu_s > 0 and first.peak_mib > 50 and not first.is_ray_worker


def test_tables_hold_the_ratios() -> None:
    def figures(rate: float) -> dict[str, float]:
        work = {"seconds": 10, "cpu_s": 14, "machine_cpu_s": 19, "cpu_ms_per_row": 1000 / rate}
        return {"rows_per_s": rate, "mb_per_s": rate / 2, **work}

    rounds = Rounds([{"bare": figures(100), "ours": figures(180)}], [0.0])
    ours = preparing_table(rounds, 2, "bare", {"ours": 0.5}).rows[1]
    assert ours[:3] == ["ours", "180", "90% (90% to 90%)"] and ours[-2:] == ["1.90", "120% (120% to 120%)"]
    assert reading_table("disk", {"random": rounds}).rows[1] == ["random: ours", "180", "90", "0.56"]
    memory = {"driver_mib": 1.0, "worker_mib": 2.0}
    grown = Rounds([{"1,000": {"rows_per_s": rate, **memory}} for rate in (250.0, 500.0, 200.0)], [0.0] * 3)
    assert growth_table(grown).rows == [["1,000", "4.00 (2.00 to 5.00)", "1", "2"]]
