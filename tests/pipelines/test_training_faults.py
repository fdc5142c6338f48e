"""What may happen to a run, on plain gloo ranks, and what becomes of it. Ray's part is in test_training_runs.py."""

from __future__ import annotations

import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import storage
from pipelines.training.checkpoint import CheckpointManifest, read_manifest, stored_names
from pipelines.training.settings import TrainSettings
from pipelines.training.watchdog import HUNG_EXIT_CODE
from tests.fixtures.fault_proxy import FaultProxy
from tests.training import losses, recipe, write_data
from tests.training_ranks import (
    Trouble,
    die_after_report_of_step_6,
    die_before_manifest_of_step_4,
    die_before_report_of_step_5,
    die_uploading_step_3,
    die_writing_step_2,
    give_up_early_on_s3,
    hang_in_step_3,
    lose_finite_losses,
    start_ranks,
    stop_in_step_3,
    train_on,
)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def expected(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of the undisturbed run on two ranks."""
    folder = tmp_path_factory.mktemp("undisturbed")
    settings = recipe(prepared, folder, run__checkpoint_every=100)
    train_on(2, settings, folder / "logs")
    return losses(settings)


def complete(settings: TrainSettings) -> list[str]:
    """The steps whose checkpoints are complete, the newest first."""
    run = storage.join(settings.run.storage, settings.run.name)
    names = stored_names(run)
    return [name[:13] for name in names if isinstance(read_manifest(storage.join(run, name)), CheckpointManifest)]


KILLS: list[tuple[Trouble, int]] = [
    (die_writing_step_2, 1),
    (die_uploading_step_3, 2),
    (die_before_manifest_of_step_4, 3),
    (die_before_report_of_step_5, 5),
    (die_after_report_of_step_6, 6),
]


@pytest.mark.s3
def test_a_kill_about_a_save_costs_at_most_that_save(
    prepared: Path, expected: dict[int, float], s3_uri: str, tmp_path: Path
) -> None:
    settings = recipe(prepared, s3_uri, run__checkpoint_every=1)
    before = 0
    for trouble, kept in KILLS:
        group = start_ranks(2, settings, tmp_path / "logs", trouble=trouble)
        assert -signal.SIGKILL in group.wait()
        if before:
            assert f"(step {before}, every file verified" in group.said()
        # A partial one may lie there, and is no checkpoint.
        assert complete(settings)[0] == f"step-{kept:08d}", trouble
        before = kept
    said = train_on(2, settings, tmp_path / "logs")
    assert "(step 6, every file verified" in said and "exported the model" in said
    assert losses(settings) == expected


def test_damaged_checkpoints_are_passed_over_aloud_and_never_for_step_0(
    prepared: Path, expected: dict[int, float], tmp_path: Path
) -> None:
    settings = recipe(prepared, tmp_path)
    train_on(2, settings, tmp_path / "logs")
    newest, middle = (next(tmp_path.glob(f"run/step-0000000{step}-*")) for step in (6, 4))
    flipped = newest / "rank-00001-of-00002.safetensors"
    data = bytearray(flipped.read_bytes())
    data[len(data) // 2] ^= 1
    flipped.write_bytes(data)
    (middle / "rank-00000-of-00002.safetensors").write_bytes(b"cut")
    said = train_on(2, settings, tmp_path / "logs")
    assert f"checkpoint {newest.name}: rank-00001-of-00002.safetensors has sha256" in said
    assert f"checkpoint {middle.name}: rank-00000-of-00002.safetensors has 3 bytes" in said
    assert "(step 2, every file verified" in said
    assert losses(settings) == expected

    for name in tmp_path.glob("run/step-*/rank-00001*"):
        name.unlink()
    said = train_on(2, settings, tmp_path / "logs")
    assert "failed: no checkpoint of this run verifies, and starting over would throw its steps away" in said
    assert said.count("rank-00001-of-00002.safetensors is missing; falling back") == 4  # and one was cut before
    assert losses(settings) == expected


@pytest.mark.s3
def test_a_store_that_is_down_for_one_save_costs_that_save_and_for_many_the_run(
    prepared: Path, expected: dict[int, float], s3_uri: str, faults: FaultProxy, tmp_path: Path
) -> None:
    settings = recipe(prepared, s3_uri, run__checkpoint_every=1, run__max_failed_saves=2)
    faults.inject("error", "PUT", "step-00000002-.*rank-00001", times=1)
    for step in (4, 5):
        faults.inject("error", "PUT", f"step-0000000{step}-.*checkpoint.json", times=1)
    said = train_on(2, settings, tmp_path / "logs", trouble=give_up_early_on_s3)
    assert "the checkpoint of step 2 could not be saved (rank 1: s3://" in said
    assert "training goes on, failed saves in a row: 1 of 2" in said
    assert "failed: the checkpoint of step 5 could not be saved (s3://" in said
    assert "the 2. in a row (run.max_failed_saves)" in said
    assert complete(settings) == ["step-00000003", "step-00000001"]
    said = train_on(2, settings, tmp_path / "logs")
    assert "(step 3, every file verified" in said
    assert losses(settings) == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own with room for one checkpoint and not for two."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoint_before(
    prepared: Path, expected: dict[int, float], small_disk: Path, tmp_path: Path
) -> None:
    settings = recipe(prepared, small_disk)
    said = train_on(2, settings, tmp_path / "logs")
    assert "failed: the checkpoint of step 4 cannot be written (rank" in said and "No space left on device" in said
    assert [path.name[:13] for path in small_disk.glob("run/step-*")] == ["step-00000002"]
    subprocess.run(["mount", "-o", "remount,size=50m", str(small_disk)], check=True)
    assert "(step 2, every file verified" in train_on(2, settings, tmp_path / "logs")
    assert losses(settings) == expected


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        (hang_in_step_3, r"rank 1 hangs at /\S+training_ranks.py:\d+ in <lambda>, while it trains; 1 of 2 ranks wait"),
        (stop_in_step_3, "rank 1 gives no sign of life: its process is stopped, dead or out of reach; 1 of 2 ranks"),
    ],
)
def test_a_rank_that_hangs_is_found_in_time_and_named(
    prepared: Path, tmp_path: Path, trouble: Trouble, words: str
) -> None:
    settings = recipe(prepared, tmp_path, run__hang_timeout_s=6)
    group = start_ranks(2, settings, tmp_path / "logs", trouble=trouble)
    group.processes[0].join(60)
    if trouble is stop_in_step_3:
        group.processes[1].kill()  # as Ray does with what is left of a group
    codes = group.wait()
    assert codes == [HUNG_EXIT_CODE, HUNG_EXIT_CODE if trouble is hang_in_step_3 else -signal.SIGKILL], group.said()
    assert "no step of this run has moved for 6 s (run.hang_timeout_s)" in group.said()
    assert re.search(words, group.said()), group.said()[-3000:]


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_losses_that_are_no_numbers_change_nothing_and_end_the_run_when_they_stay(
    prepared: Path, tmp_path: Path, stage: int
) -> None:
    settings = recipe(prepared, tmp_path, run__max_bad_steps=2, deepspeed__stage=stage)
    said = train_on(2, settings, tmp_path / "logs", trouble=lose_finite_losses)
    assert "step 3: the loss or its gradients are not finite, so the step changes nothing (1 in a row" in said
    assert "failed: step 6: the loss or its gradients are not finite, 2 steps in a row (run.max_bad_steps)" in said
    named = said.split("look at the samples of this step: ")[1].split(". The last")[0]
    assert named.count("test:") == 4 and "(id " in named  # the short batch of the second epoch
    assert complete(settings)[0] == "step-00000004"
    said = train_on(2, settings, tmp_path / "logs")
    assert "(step 4, every file verified" in said
    assert all(0 < loss < 10 for step, loss in losses(settings).items() if step > 3)
