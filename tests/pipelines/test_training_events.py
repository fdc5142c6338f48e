"""The record of a run: errands that fail, events of several processes, the log of an object store."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from pipelines import storage
from pipelines.storage.faults import StorageError
from pipelines.training.errands import Errands
from pipelines.training.events import EventLog, read_events, record
from pipelines.training.flops import find_peak
from pipelines.training.optimization import learning_rates
from pipelines.training.run_log import RunLog, read_metrics, readable
from pipelines.training.settings import OptimSettings
from tests.pipelines.test_training_metrics import figures


def test_errands_are_done_in_order_and_a_failing_one_costs_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    done: list[int] = []
    errands = Errands("telling the server")
    for number in range(5):
        errands.add(lambda number=number: done.append(10 // (number - 2)))
    errands.close()
    assert done == [-5, -10, 10, 5]
    errands = Errands("telling the server")
    for _ in range(3):
        errands.add(lambda: 1 // 0)
    errands.close()
    assert errands.failed == 3
    said = capsys.readouterr().out
    assert said.count("telling the server failed (ZeroDivisionError") == 2, "the first of each, and no more"
    assert "telling the server failed 3 times in all" in said


def test_an_errand_that_never_ends_holds_up_nobody(capsys: pytest.CaptureFixture[str]) -> None:
    gate = threading.Event()
    errands = Errands("telling the server")
    started = time.monotonic()
    for _ in range(1002):
        errands.add(lambda: gate.wait(60) and None)
    errands.close(patience_s=0.2)
    gate.set()
    assert time.monotonic() - started < 10
    assert errands.failed >= 1002 - 1
    assert "others wait before it" in capsys.readouterr().out


def test_events_of_several_processes_are_read_in_order_of_time(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    assert read_events(run) == []
    driver, worker = EventLog(run, "driver"), EventLog(run, "worker")
    driver.write("started", host="here")
    worker.note("no checkpoint yet: starting at step 0")
    driver.write("ended", outcome="finished", message="")
    driver.close()
    worker.close()
    record(run, "watchdog", "hung", message="rank 1 hangs")
    found = [(event["kind"], event["who"]) for event in read_events(run)]
    assert found == [("started", "driver"), ("note", "worker"), ("ended", "driver"), ("hung", "watchdog")]


def test_an_event_that_could_not_be_written_comes_with_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, down = storage.write_bytes, threading.Event()
    tried = threading.Event()

    def flaky(uri: str, data: bytes) -> None:
        if down.is_set():
            tried.set()
            raise StorageError(f"{uri}: the store answers: Slow down")
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", flaky)
    down.set()
    log = EventLog(str(tmp_path), "worker")
    log.note("first")
    assert tried.wait(10)
    down.clear()
    log.note("second")
    log.close()
    assert [event["message"] for event in read_events(str(tmp_path))] == ["first", "second"]
    assert "the store answers: Slow down); training goes on" in capsys.readouterr().out


@pytest.mark.s3
def test_the_log_of_an_object_store_outlives_its_faults(
    s3_uri: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = f"{s3_uri}/runs/far"
    written: list[str] = []
    write, down = storage.write_bytes, threading.Event()

    def counting(uri: str, data: bytes) -> None:
        if down.is_set():
            raise StorageError(f"{uri}: no answer")
        written.append(uri)
        write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", counting)
    with RunLog(run, num_steps=3, start_step=0) as log:
        log.write(1, figures(1.0))
        log.flush()
        _until(lambda: any("events.out" in uri for uri in written) and any("metrics" in uri for uri in written))
        down.set()
        log.write(2, figures(2.0))
        log.flush()
        _until(lambda: "no answer" in capsys.readouterr().out)
        down.clear()
        log.write(3, figures(3.0))
    assert [line["loss"] for line in read_metrics(run)] == [1.0, 2.0, 3.0]
    before = len(written)
    log._copy()  # nothing has changed since
    assert len(written) == before


def _until(condition: object) -> None:
    deadline = time.monotonic() + 20
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_parts_that_learn_at_another_rate_are_logged_by_name() -> None:
    optim = OptimSettings(lr=1e-3, part_lr={"vision_tower": 1e-5})
    assert learning_rates(optim, ["projector", "pooling"], 0.5) == {"lr": 5e-4}
    found = learning_rates(optim, ["vision_tower", "projector"], 0.5)
    assert found == {"lr": 5e-4, "lr_vision_tower": pytest.approx(5e-6)}
    assert "| lr 5.00e-04 (vision_tower 5.00e-06) |" in readable(5, 10, figures(1.0) | found)
    # No part learns at optim.lr: what is logged are rates that something learns at.
    assert learning_rates(optim, ["vision_tower"], 1.0) == {"lr": 1e-5}


def test_a_peak_is_stated_or_measured() -> None:
    cpu = torch.device("cpu")
    assert find_peak(0.25, cpu, torch.float32) == (0.25, "stated by the recipe")
    peak = find_peak(None, cpu, torch.float32)
    assert peak.source == "measured by matrix products in float32" and 1e-4 < peak.tflops < 100
