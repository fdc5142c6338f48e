"""Weights & Biases and MLflow, by their real libraries: W&B offline, MLflow with its store in a folder."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run
from pydantic import ValidationError
from wandb.proto.wandb_internal_pb2 import Record

from pipelines.serving.transport import free_port
from pipelines.training.launch import check_inputs
from pipelines.training.run_log import RunLog, log_late_scores, read_metrics
from pipelines.training.scores import ScoreLog
from pipelines.training.settings import TrainSettings
from pipelines.training.tracking import Tracker, TrackingError, check_tracking, open_trackers, run_word
from pipelines.training.tracking_settings import TrackingSettings
from tests.pipelines.test_training_keeper import score
from tests.pipelines.test_training_metrics import figures
from tests.training import recipe, write_data
from tests.training_ranks import train_on


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    return f"file://{tmp_path}/mlruns"


def settings(prepared: Path, storage: Path, **tracking: Any) -> TrainSettings:
    return recipe(prepared, storage, tracking=tracking)


def log(settings: TrainSettings, start_step: int) -> RunLog:
    run = f"{settings.run.storage}/run"
    return RunLog(run, 6, start_step, lambda folder: open_trackers(settings, run, folder))


def mlflow_runs(uri: str) -> list[Run]:
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("flashsloth")
    assert experiment
    return client.search_runs([experiment.experiment_id])


def wandb_records(file: Path) -> Iterator[Record]:
    """What W&B would send: its file is a LevelDB log, blocks of 32 KiB of records with a header of 7 bytes."""
    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        left = 2**15 - place % 2**15
        if left < 7:
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(whole)
            whole = b""


def wandb_history(file: Path) -> tuple[str, list[dict[str, Any]]]:
    """The run's id, and what was logged."""
    records = list(wandb_records(file))
    (run,) = [record.run for record in records if record.HasField("run")]
    rows = [
        {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    return f"{run.project}/{run.run_id}", rows


def test_a_resumed_run_goes_on_as_the_same_run_at_both(prepared: Path, tmp_path: Path, store: str) -> None:
    ours = settings(prepared, tmp_path / "runs", mlflow={"uri": store}, wandb={"mode": "offline", "project": "sloths"})
    check_tracking(ours.tracking)
    with pytest.raises(RuntimeError, match="killed"), log(ours, 0) as first:
        for step in (1, 2, 3):
            first.write(step, figures(float(step)))
        raise RuntimeError("killed")
    assert [run.info.status for run in mlflow_runs(store)] == ["KILLED"]
    with log(ours, 2) as second:
        for step in (3, 4):
            second.write(step, figures(10.0 * step))
    (run,) = mlflow_runs(store)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.params["optim.lr"] == "0.003" and run.data.params["tracking.wandb.project"] == "sloths"
    history = MlflowClient(tracking_uri=store).get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 2.0), (3, 3.0), (3, 30.0), (4, 40.0)]

    files = sorted((tmp_path / "runs" / "run" / "wandb").glob("offline-run-*/*.wandb"))
    word = run_word(str(tmp_path / "runs" / "run"))
    found = [wandb_history(file) for file in files]
    assert [name for name, _ in found] == [f"sloths/{word}"] * 2
    assert [[(row["step"], row["train/loss"]) for row in rows] for _, rows in found] == [
        [(1, 1.0), (2, 2.0), (3, 3.0)],
        [(3, 30.0), (4, 40.0)],
    ]


def test_scores_of_evaluated_checkpoints_are_logged_as_they_come_and_after_the_end(
    prepared: Path, tmp_path: Path, store: str
) -> None:
    ours = settings(prepared, tmp_path / "runs", mlflow={"uri": store}, wandb={"mode": "offline"})
    uri = f"{ours.run.storage}/run"

    def trackers(folder: Path) -> list[Tracker]:
        return open_trackers(ours, uri, folder)

    found = ScoreLog(uri)
    with pytest.raises(RuntimeError, match="killed"), RunLog(uri, 6, 0, trackers, evaluated=True) as first:
        for step in (1, 2, 3):
            first.write(step, figures(1.0))
        found.add(score(2, 0.5, exact=0.25), is_best=True)
        found.add(score(4, 0.4, exact=0.5), is_best=True)  # of a checkpoint that this attempt does not come to
        raise RuntimeError("killed")
    # The next attempt goes on from step 2, whose score it has; that of step 4 it logs when it is there.
    with RunLog(uri, 6, 2, trackers, evaluated=True) as second:
        for step in (3, 4, 5, 6):
            second.write(step, figures(1.0))
    found.add(score(6, 0.3, exact=0.75), is_best=True)
    log_late_scores(uri, trackers)
    log_late_scores(uri, lambda folder: pytest.fail("there is nothing left to tell"))

    lines = [json.loads(line) for line in (tmp_path / "runs/run/metrics.jsonl").read_text().splitlines()]
    scores = [(line["step"], line["checkpoint"], line["evaluation"]) for line in lines if "evaluation" in line]
    expected = {2: (0.5, 0.25), 4: (0.4, 0.5), 6: (0.3, 0.75)}
    assert scores == [
        (step, score(step, 0.0).checkpoint, {"loss": loss, "exact_match": exact})
        for step, (loss, exact) in expected.items()
    ]
    assert [line["step"] for line in read_metrics(uri)] == [1, 2, 3, 4, 5, 6]
    (run,) = mlflow_runs(store)
    client = MlflowClient(tracking_uri=store)
    for number, name in enumerate(("evaluation/loss", "evaluation/exact_match")):
        history = client.get_metric_history(run.info.run_id, name)
        assert [(point.step, point.value) for point in history] == [(s, each[number]) for s, each in expected.items()]
    assert run.info.status == "FINISHED"
    files = sorted((tmp_path / "runs" / "run" / "wandb").glob("offline-run-*/*.wandb"))
    told = [row for file in files for row in wandb_history(file)[1] if "evaluation/loss" in row]
    assert [(row["step"], row["evaluation/loss"]) for row in told] == [(s, loss) for s, (loss, _) in expected.items()]


def test_a_real_run_tells_its_trackers_what_it_logs(prepared: Path, tmp_path: Path) -> None:
    ours = settings(prepared, tmp_path, wandb={"mode": "offline"})
    train_on(2, ours, tmp_path / "logs", at_step=3)
    train_on(2, ours, tmp_path / "logs")
    files = sorted((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))
    found = [wandb_history(file) for file in files]
    assert len({name for name, _ in found}) == 1
    told = [row for _, rows in found for row in rows]
    lines = read_metrics(str(tmp_path / "run"))
    assert [row["step"] for row in told] == [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    for row, line in zip(told, lines, strict=True):
        assert {name: row[f"train/{name}"] for name in line if name not in ("step", "time")} == {
            name: value for name, value in line.items() if name not in ("step", "time")
        }


def test_a_tracker_that_fails_in_the_middle_costs_a_warning_and_no_step(
    prepared: Path, tmp_path: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = settings(prepared, tmp_path / "runs", mlflow={"uri": store})
    with log(ours, 0) as running:
        running.write(1, figures(1.0))
        tracker: Tracker = running._trackers[0]
        # Calls are done in order: nothing writes to the store any more once this one is.
        told = threading.Event()
        tracker._errands.add(told.set)
        assert told.wait(30)
        assert list((tmp_path / "mlruns").glob("*/*/metrics/train/loss"))
        shutil.rmtree(tmp_path / "mlruns")
        (tmp_path / "mlruns").write_text("the disk of the server is gone")
        for step in (2, 3, 4):
            running.write(step, figures(float(step)))
    said = capsys.readouterr().out
    assert said.count("telling MLflow at file://") == 2  # once when it fails, once at the end with the count
    assert "training goes on" in said and tracker.failed == 4
    assert [line["step"] for line in read_metrics(str(tmp_path / "runs" / "run"))] == [1, 2, 3, 4]


def test_a_server_that_is_down_from_the_start_holds_up_nothing(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    uri = f"http://127.0.0.1:{free_port()}"
    ours = settings(prepared, tmp_path, mlflow={"uri": uri})
    check_tracking(ours.tracking)
    started = time.monotonic()
    with log(ours, 0) as running:
        for step in (1, 2):
            running.write(step, figures(1.0))
        assert time.monotonic() - started < 10
    said = capsys.readouterr().out
    assert f"telling MLflow at {uri} failed" in said and "failed 3 times in all" in said


def test_what_is_missing_is_an_error_before_anything_starts(
    prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no key of the person who runs the tests
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(TrackingError, match=r"set WANDB_API_KEY .* or set tracking.wandb.mode to offline"):
        check_tracking(TrackingSettings.model_validate({"wandb": {}}))
    with pytest.raises(TrackingError, match=r"tracking.mlflow.uri gopher://x: "):
        check_tracking(TrackingSettings.model_validate({"mlflow": {"uri": "gopher://x"}}))
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "mlflow" else find(name, *rest)
    )
    with pytest.raises(
        TrackingError, match=r"mlflow-skinny, which is not installed here: pip install '\.\[tracking\]'"
    ):
        check_inputs(settings(prepared, tmp_path, mlflow={"uri": "http://x"}))
    check_tracking(TrackingSettings())


def test_passwords_are_no_settings() -> None:
    with pytest.raises(ValidationError, match="MLFLOW_TRACKING_PASSWORD"):
        TrackingSettings.model_validate({"mlflow": {"uri": "https://me:secret@host"}})
