"""`jobs/benchmark.py`, as it is called: whether it measures and reports, never how fast. Parts have their own tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jobs.benchmark import main
from pipelines import storage
from pipelines.benchmarks.table import Report
from tests.fixtures.ray_session import REPOSITORY


@pytest.mark.ray
def test_data_is_measured_from_beginning_to_end(tmp_path: Path) -> None:
    """Without `growth`, every size of which starts a Ray of its own."""
    flags = ["--quick", "--output", str(tmp_path), "--parts", "prepare,sharing,read", "--workers", "1"]
    job = [sys.executable, str(REPOSITORY / "jobs" / "benchmark.py"), "data", *flags]
    run = subprocess.run(job, capture_output=True, text=True, timeout=300)
    assert run.returncode in (0, 1), run.stderr  # 1: a bound is not met, as is likely with 24 rows
    report = Report.model_validate_json((tmp_path / "data.json").read_text())
    assert [table.title.partition(" ")[0] for table in report.tables] == ["Images", "Images", "Reading"]
    assert {"prepare", "sharing", "read from a local disk"} == set(report.measured)
    assert all(bound.measured > 0 for bound in report.bounds if "read from" in bound.name)
    assert report.tables[0].text() in run.stdout
    assert not (tmp_path / "work" / "out").exists()


@pytest.mark.ray
@pytest.mark.s3
def test_preparation_is_measured_to_and_from_s3(tmp_path: Path, s3_uri: str) -> None:
    folder = storage.join(s3_uri, "bench")
    flags = ["--quick", "--output", str(tmp_path), "--parts", "prepare", "--s3", folder]
    job = [sys.executable, str(REPOSITORY / "jobs" / "benchmark.py"), "data", *flags]
    run = subprocess.run(job, capture_output=True, text=True, timeout=300)
    assert run.returncode in (0, 1), run.stderr
    report = Report.model_validate_json((tmp_path / "data.json").read_text())
    (figures,) = report.measured["prepare"]["rounds"]
    shown = [row[0] for row in report.tables[0].rows]
    for name in ("prepare", "prepare to S3", "prepare from S3 to S3"):
        assert name in figures and name in shown
        assert any(bound.name.startswith(f"{name}: share of") for bound in report.bounds)
    assert storage.list_names(folder) == []


def test_a_subject_that_does_not_exist_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dato"]) == 2
    assert "annotate,data,engine,serve,train" in capsys.readouterr().err


def test_clients_without_those_of_the_bounds_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["serve", "--concurrent", "[1, 4]"])
    assert end.value.code == 2
    assert "[1, 4] lacks 16, which the bounds speak of: add it" in capsys.readouterr().err


def test_the_engine_is_measured_at_a_tiny_size_without_a_gpu(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["engine", "--quick", "--output", str(tmp_path)]) == 0
    report = Report.model_validate_json((tmp_path / "engine.json").read_text())
    assert report.tables[0].text() in capsys.readouterr().out and not report.bounds
    for name in ("base", "hd"):
        figures = report.measured["engine"][name]
        assert min(figures.values()) > 0 and figures["bytes_per_token"] < 2e6  # a tiny model in bf16
    if not torch.cuda.is_available():
        assert main(["engine", "--output", str(tmp_path)]) == 1
        assert "needs a GPU; --quick shows that it runs" in capsys.readouterr().err
