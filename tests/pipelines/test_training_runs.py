"""Training on real Ray Train workers with real DeepSpeed, at a size that takes seconds."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.report.run_sources import run_report
from pipelines.training.launch import ResourceError, TrainingError, check_cluster, check_inputs, train
from pipelines.training.run_log import read_metrics
from tests.training import NUM_STEPS, check_export, completed, losses, recipe, write_data
from tests.training_ranks import train_on

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("prepared"))


@pytest.mark.timeout(1200)
def test_a_run_survives_a_kill_a_hang_and_a_damaged_checkpoint_bit_for_bit(
    ray_session: None, prepared: Path, tmp_path: Path
) -> None:
    undisturbed = recipe(prepared, tmp_path / "a")
    train_on(2, undisturbed, tmp_path / "logs")
    expected = losses(undisturbed)
    assert list(expected) == list(range(1, NUM_STEPS + 1))

    # Worker 1 is killed in step 4; then it damages the newest checkpoint, of step 4, and hangs in step 6. Each time the
    # run goes on from the newest checkpoint that verifies.
    disturbed = recipe(prepared, tmp_path / "b", run__hang_timeout_s=10)
    check_inputs(disturbed)
    check_cluster(disturbed.scaling)
    exported = train(disturbed, disturbed_worker)
    assert {path.name for path in (tmp_path / "b").iterdir()} >= {"killed", "hung"}
    assert losses(disturbed) == expected
    said = (tmp_path / "b" / "said").read_text()
    assert said.count("no checkpoint yet: starting at step 0") == 1
    assert [int(step) for step in re.findall(r"\(step (\d), every file verified", said)] == [2, 2]
    assert re.search(r"checkpoint (step-00000004-\w+): \S+\.safetensors has sha256 .*; falling back to the one", said)
    assert re.search(r"no step of this run has moved for 10 s .*: rank 1 hangs at \S+test_training_runs.py:\d+", said)
    check_export(exported, prepared)
    _check_folder(Path(exported).parent)
    _check_report(Path(exported).parent)

    # Nothing verifies: it never starts over in silence, and three restarts would not mend it.
    for manifest in (tmp_path / "b" / "run").glob("step-*/checkpoint.json"):
        manifest.unlink()
    with pytest.raises(TrainingError, match=r"no checkpoint of this run verifies.*was never completed"):
        train(recipe(prepared, tmp_path / "b", scaling__num_workers=1))


def disturbed_worker(config: dict[str, Any]) -> None:
    """`train_worker`; rank 1 is killed in step 4, and in the next attempt damages a checkpoint and sleeps in step 6."""
    from pipelines.training import loop

    storage = Path(config["settings"]["run"]["storage"])
    step = loop.WorkerRun.step
    sys.stdout = sys.stderr = (storage / "said").open("a", buffering=1)

    def disturbed(self: Any, number: int, *rest: Any) -> None:
        if self.rank == 1 and number == 3 and _first(storage / "killed"):
            completed(storage / "run", "step-00000002")
            os.kill(os.getpid(), signal.SIGKILL)
        if self.rank == 1 and number == 5 and _first(storage / "hung"):
            _damage(completed(storage / "run", "step-00000004"))
            time.sleep(600)
        step(self, number, *rest)

    loop.WorkerRun.step = disturbed
    loop.train_worker(config)


def _first(marker: Path) -> bool:
    if marker.exists():
        return False
    marker.touch()
    return True


def _damage(folder: Path) -> None:
    victim = sorted(folder.glob("*.safetensors"))[0]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)


def _check_folder(run: Path) -> None:
    assert {"config.yaml", "metrics.jsonl", "tensorboard", "export"} <= {path.name for path in run.iterdir()}
    assert list((run / "tensorboard").glob("events.*"))
    line = read_metrics(str(run))[-1]
    wanted = ("lr", "grad_norm", "samples_per_s", "tokens_per_s", "data_wait_share", "memory_gib", "samples_seen")
    wanted += ("data_wait_share_max", "seconds_per_step")
    wanted += ("padding_share", "checkpoint_s", "tflops_vision", "tflops_language", "mfu", "mfu_vision", "mfu_language")
    assert all(np.isfinite(line[name]) for name in wanted)
    assert line["mfu"] == pytest.approx(10 * (line["tflops_vision"] + line["tflops_language"])) and line["mfu"] > 0
    assert line["samples_seen"] == 40
    # A killed attempt's leftovers are gone, and the two newest checkpoints are kept.
    assert sorted(path.name[:13] for path in run.glob("step-*")) == ["step-00000004", "step-00000006"]


def _check_report(run: Path) -> None:
    assert ">finished<" in (run / "report.html").read_text("utf-8")
    history = run_report(str(run)).history
    assert [attempt.step for attempt in history.attempts] == [0, 2, 2]
    killed, hung, last = history.attempts
    assert killed.why.startswith("lost rank 1 on ") and killed.is_failure
    assert "rank 1 hangs at" in hung.why and hung.is_failure
    assert last.why == "finished" and last.world_size == 2
    assert history.saved[-1] == 6  # of the others, workers may have died before they heard


def test_workers_that_never_come_are_an_error_after_the_deadline(
    ray_session: None, prepared: Path, tmp_path: Path
) -> None:
    settings = recipe(prepared, tmp_path, scaling__cpus_per_worker=4, run__start_timeout_s=4)
    started = time.monotonic()
    with pytest.raises(ResourceError, match=r"waited 4 s .* for 2 workers with 4 CPU and 0 GPU each; free .* CPU"):
        train(settings)
    assert time.monotonic() - started < 120
