"""Tests for pipelines/benchmarks/reading.py, preparing.py and the tables: whether they measure, never how fast."""

from __future__ import annotations

from pathlib import Path

import pytest

from flashsloth import FlashSlothProcessor
from pipelines.benchmarks.data_tables import growth_table, preparing_table, reading_table
from pipelines.benchmarks.preparing import LoaderContestant, Photos, bare_loop
from pipelines.benchmarks.processes import process_tree
from pipelines.benchmarks.reading import MDS, OURS, TARS, read_all, write_copies
from pipelines.benchmarks.rounds import Rounds
from tests.corpus import write_corpus, write_processor
from tests.fixtures.tiny import build_processor
from tests.prepared import coloured_rows, write_prepared

NUM_ROWS = 40
_FIRST_BATCH = 16  # before the clock starts


@pytest.fixture(scope="module")
def processor() -> FlashSlothProcessor:
    return build_processor()


@pytest.mark.parametrize("name", [OURS, MDS, TARS])
def test_every_reader_reads_every_row(tmp_path: Path, processor: FlashSlothProcessor, name: str) -> None:
    copies = write_copies(write_prepared(tmp_path / "shards", coloured_rows(NUM_ROWS), processor), str(tmp_path))
    if name not in copies.contestants:
        pytest.skip(f"{name} is not installed (the extra `bench`)")
    array_bytes = 3 * 126 * 126
    for is_random in (False, True) if name != TARS else (False,):
        figures = read_all(copies, name, is_random, num_workers=1, seed=0)
        assert figures["rows"] == NUM_ROWS - _FIRST_BATCH
        assert figures["mb_per_s"] * 1e6 > figures["rows_per_s"] * array_bytes


def test_the_loop_and_the_loader_make_every_row(tmp_path: Path) -> None:
    """Text-only rows are none of theirs: the photos' corpus has an image in each."""
    rows = write_corpus(tmp_path, 3)
    write_processor(tmp_path)
    photos = Photos(tmp_path, rows)
    for figures in (bare_loop(photos), LoaderContestant(photos, 1)()):
        assert figures["rows_per_s"] == pytest.approx(3 / figures["seconds"])


def test_this_process_is_the_first_of_its_tree() -> None:
    first = process_tree()[0]
    assert first.cpu_s > 0 and first.peak_mib > 50 and not first.is_ray_worker


def test_tables_hold_the_ratios() -> None:
    def figures(rate: float) -> dict[str, float]:
        return {"rows_per_s": rate, "mb_per_s": rate / 2, "cpu_ms_per_row": 1000 / rate}

    rounds = Rounds([{"bare": figures(100), "ours": figures(180)}], [0.0])
    assert preparing_table(rounds, 2, "bare", {"ours": 0.5}).rows[1][:3] == ["ours", "180", "90% (90% to 90%)"]
    assert reading_table("disk", {"random": rounds}).rows[1] == ["random: ours", "180", "90", "0.56"]
    memory = {"driver_mib": 1.0, "worker_mib": 2.0}
    assert growth_table({1000: {"rows_per_s": 250.0, **memory}}).rows == [["1,000", "4.00", "1", "2"]]
