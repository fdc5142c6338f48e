"""A rank of a training run without Ray, and the ways in which tests disturb it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from s3fs import S3FileSystem

from pipelines import storage
from pipelines.storage import stores
from pipelines.training import export, saver
from pipelines.training.host import Host, Outcome, Request
from pipelines.training.loop import WorkerRun, run_worker
from pipelines.training.process import prepare_process
from pipelines.training.saver import CheckpointSaver
from pipelines.training.settings import TrainSettings
from tests.fixtures.tiny import build_processor, build_tiny_model
from tests.ranks import RankGroup


class ToldHost(Host):
    """Asks for what the test says, at the end of the so-manyeth step of this attempt, and prints how the run ended."""

    def __init__(self, at_step: int | None, request: Request) -> None:
        self._left = at_step or 10**9
        self._request = request

    def request(self) -> Request:
        self._left -= 1
        return Request.NOTHING if self._left else self._request

    def report(self, name: str, step: int) -> None:
        print(f"reported step {step}", flush=True)

    def end(self, outcome: Outcome) -> None:
        print(f"{outcome.kind}: {outcome.message}", flush=True)


Trouble = Callable[[int], None]
"""Prepares the rank whose number it gets for what shall happen to it."""


def train_rank(
    rank: int, settings: dict[str, Any], at_step: int | None, request: Request, trouble: Trouble | None
) -> None:
    """The work of one rank; `trouble` first."""
    if trouble:
        trouble(rank)
    run_worker(TrainSettings.model_validate(settings), prepare_process(1, on_gpu=False), ToldHost(at_step, request))


def start_ranks(
    world_size: int,
    settings: TrainSettings,
    logs: Path,
    at_step: int | None = None,
    request: Request = Request.STOP,
    trouble: Trouble | None = None,
) -> RankGroup:
    """Start a run, or go on with it, on `world_size` ranks."""
    dumped = settings.model_dump(mode="json")
    return RankGroup(world_size, train_rank, dumped, at_step, request, trouble, logs=logs)


def train_on(world_size: int, settings: TrainSettings, logs: Path, **how: Any) -> str:
    """`start_ranks`, all of which must end well; returns what they printed."""
    group = start_ranks(world_size, settings, logs, **how)
    codes = group.wait()
    assert codes == [0] * world_size, f"exit codes {codes}:\n{group.said()[-6000:]}"
    return group.said()


# Troubles. Each is a function of the rank at module level, since it travels to another process.


def die() -> None:
    """SIGKILL, to oneself."""
    os.kill(os.getpid(), signal.SIGKILL)


def die_writing_step_2(rank: int) -> None:
    """Rank 1 is killed with half of its file written."""
    whole = saver.write_state

    def half(engine: Any, path: Path) -> None:
        whole(engine, path)
        if rank == 1 and "step-00000002" in str(path):
            os.truncate(path, path.stat().st_size // 2)
            die()

    saver.write_state = half


def die_uploading_step_3(rank: int) -> None:
    """Rank 1 is killed when its file is written, before it is handed over; rank 0's is."""
    _before_method(CheckpointSaver, "_hand_over", lambda self, save: rank == 1 and "step-00000003" in save.name)


def die_before_manifest_of_step_4(rank: int) -> None:
    """Rank 0 is killed when everything but the manifest is in place."""
    write = storage.write_bytes

    def dying(uri: str, data: bytes) -> None:
        if "step-00000004" in uri:
            time.sleep(0.3)  # the other rank shall have uploaded
            die()
        write(uri, data)

    storage.write_bytes = dying


def die_before_report_of_step_5(rank: int) -> None:
    """Rank 0 is killed when the checkpoint is complete and nobody has heard of it."""
    _before_method(ToldHost, "report", lambda self, name, step: rank == 0 and step == 5)


def die_after_report_of_step_6(rank: int) -> None:
    """Rank 1 is killed when the checkpoint has been reported."""
    report = ToldHost.report

    def dying(self: ToldHost, name: str, step: int) -> None:
        report(self, name, step)
        if rank == 1 and step == 6:
            die()

    ToldHost.report = dying  # type: ignore[method-assign]


def die_writing_weights(rank: int) -> None:
    """Killed with half of the exported weights on the disk."""
    save = transformers.modeling_utils.safe_save_file

    def half(tensors: Any, path: str, **rest: Any) -> None:
        save(tensors, path, **rest)
        os.truncate(path, os.path.getsize(path) // 2)
        die()

    transformers.modeling_utils.safe_save_file = half


def die_before_rename(rank: int) -> None:
    """Killed with the whole export written, beside its place."""
    export._replace = lambda folder, target: die()


def export_and_die(rank: int, target: str, file: str) -> None:
    """Export the tiny model of the fixtures to an object store; killed when `file` is to be uploaded."""
    upload = S3FileSystem.put_file

    def dying(self: S3FileSystem, local: str, remote: str, **rest: Any) -> None:
        if remote.endswith(file):
            die()
        upload(self, local, remote, **rest)

    S3FileSystem.put_file = dying
    processor = build_processor()
    model = build_tiny_model(processor)
    export.write_export(target, model, model.state_dict(), processor, step=2)


def hang_in_step_3(rank: int) -> None:
    """Rank 1 sleeps in its third step."""
    _before_method(WorkerRun, "step", lambda self, number, *rest: rank == 1 and number == 2, lambda: time.sleep(600))


def stop_in_step_3(rank: int) -> None:
    """Rank 1's process is stopped in its third step, all its threads with it."""
    _before_method(
        WorkerRun,
        "step",
        lambda self, number, *rest: rank == 1 and number == 2,
        lambda: os.kill(os.getpid(), signal.SIGSTOP),
    )


def lose_finite_losses(rank: int) -> None:
    """The losses of steps 3, 5 and 6 are no numbers, on rank 1 alone."""
    step = WorkerRun.step

    def spoiled(self: WorkerRun, number: int, *rest: Any) -> None:
        handle = None
        if rank == 1 and number in (2, 4, 5):
            handle = self.engine.module.register_forward_hook(_not_a_number)
        step(self, number, *rest)
        if handle:
            handle.remove()

    WorkerRun.step = spoiled  # type: ignore[method-assign]


def _not_a_number(module: Any, arguments: Any, output: Any) -> Any:
    output.loss = output.loss * torch.tensor(float("nan"))
    return output


def give_up_early_on_s3(rank: int) -> None:
    """No retries: the tests' faults last."""
    stores._S3_OPTIONS["config_kwargs"]["retries"]["total_max_attempts"] = 1


def _before_method(owner: type, name: str, when: Callable[..., bool], then: Callable[[], None] = die) -> None:
    method = getattr(owner, name)

    def disturbed(*arguments: Any) -> Any:
        if when(*arguments):
            then()
        return method(*arguments)

    setattr(owner, name, disturbed)
