"""What Ray Train and DeepSpeed cost: one worker of a real run against a bare loop of torch, taking turns.

The run is what `jobs/train.py` starts: Ray Train's controller, a worker with watchdog, supervisor, log and feed, and
ZeRO at the stage that a run takes by default. At the end of every few steps its worker stops, and the bare loop, a
process beside it, does the same steps on the same batches. Start-up, checkpoints and export lie outside of what is
timed; Ray's own processes run beside both.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch.distributed as dist

from pipelines import storage
from pipelines.benchmarks.bare_loop import BareLoop
from pipelines.benchmarks.rounds import Figures, Rounds
from pipelines.benchmarks.sizes import MID, TINY, TRAIN_PARTS, Size
from pipelines.benchmarks.table import Bound, Table
from pipelines.feed import PreparedRows
from pipelines.ray_session import start_ray
from pipelines.training.host import RayHost, Request
from pipelines.training.launch import resolve_settings, train
from pipelines.training.loop import run_uri, run_worker
from pipelines.training.process import prepare_process
from pipelines.training.run_log import read_metrics
from pipelines.training.settings import TrainSettings

_RUN, _BARE = "Ray Train + DeepSpeed", "bare torch"
_TURNS_NAME = "turns.json"
# Name -> the model and the steps of a turn, which make seconds of each.
_SIZES: dict[str, tuple[Size, int]] = {"mid": (MID, 2), "tiny": (TINY, 16)}


def measure_overhead(
    work: Path, num_rows: int, rows_per_step: int, rounds: int, seed: int
) -> tuple[Table, list[Bound], dict[str, Any]]:
    """Measure every size.

    Args:
        work: Folder for data and runs.
        num_rows: Rows of the folder that is trained on.
        rows_per_step: Rows of a step.
        rounds: Turns of each contestant that count; one before them warms up.
        seed: Of data and weights.
    """
    start_ray()
    found = {}
    try:
        for name in _SIZES:
            settings = _settings(work, name, num_rows, rows_per_step, rounds + 1, seed)
            found[name] = _measure(settings)
    finally:
        ray.shutdown()
    cells = []
    for name, turns in found.items():
        steps = _SIZES[name][1]
        ratio, cpu = turns.ratio(_RUN, _BARE, "seconds"), turns.ratio(_RUN, _BARE, "cpu_s")
        cells.append(
            [
                name,
                *(f"{1000 * turns.spread(each, 'seconds').median / steps:,.1f}" for each in (_BARE, _RUN)),
                f"{ratio.median - 1:+.1%} ({ratio.low - 1:+.1%} to {ratio.high - 1:+.1%})",
                f"{cpu.median - 1:+.1%}",
            ]
        )
    turns_of = " and ".join(f"{steps} steps ({name})" for name, (_, steps) in _SIZES.items())
    table = Table(
        title="Ray Train and DeepSpeed against a bare loop of torch, one worker",
        columns=["model", "bare, ms a step", "ours, ms a step", "more", "more CPU time"],
        rows=cells,
        notes=[
            f"{rows_per_step} rows a step, packed; fp32, default ZeRO, one thread; {rounds} turns of {turns_of} "
            "each, start-up excluded. Same batches, model, clipping and AdamW; Ray's own processes run beside both.",
        ],
    )
    bounds = [
        Bound(
            name=f"overhead of Ray Train and DeepSpeed, {name} model",
            sense="at most",
            wanted=0.05,
            measured=turns.ratio(_RUN, _BARE, "seconds").median - 1,
        )
        for name, turns in found.items()
    ]
    return table, bounds, {name: turns.record() for name, turns in found.items()}


def _settings(work: Path, name: str, num_rows: int, rows_per_step: int, turns: int, seed: int) -> TrainSettings:
    size, steps_per_turn = _SIZES[name]
    _, folder = size.write(work, num_rows, seed)
    longest = int(PreparedRows([folder]).num_tokens.max())
    settings = TrainSettings.model_validate(
        {
            "model": size.model(work).model_dump(),
            "train_parts": TRAIN_PARTS,
            "data": {"folders": [folder], "reader_threads": 1},
            "batch": {"global_size": rows_per_step, "max_tokens": 2 * longest, "pack_to": max(1024, longest)},
            "max_steps": turns * steps_per_turn,
            "precision": "fp32",
            "scaling": {"num_workers": 1, "cpus_per_worker": 1, "gpus_per_worker": 0, "peak_tflops": 0.1},
            # A run of its own each time: there is nothing to go on from.
            "run": {
                "name": f"overhead-{name}-{time.time_ns()}",
                "storage": str(work / "runs"),
                "seed": seed,
                "log_every": steps_per_turn,
            },
        }
    )
    return resolve_settings(settings)


def _measure(settings: TrainSettings) -> Rounds:
    train(settings, _worker)
    run = run_uri(settings.run)
    rounds = Rounds(**json.loads(storage.read_bytes(storage.join(run, _TURNS_NAME))))
    ours = [line["loss"] for line in read_metrics(run)][1:]
    theirs = [figures[_BARE]["loss"] for figures in rounds.figures]
    if not np.allclose(ours, theirs, rtol=1e-3, atol=0):
        raise ValueError(f"the two do not compute the same, so their times compare nothing: losses {ours} and {theirs}")
    return rounds


class _TurnHost(RayHost):
    """Ends a turn after every so many steps, and lets the bare loop do the same steps."""

    def __init__(self, supervisor: Any, bare: BareLoop, steps_per_turn: int) -> None:
        super().__init__(supervisor, dist.get_rank())
        self._bare = bare
        self._steps_per_turn = steps_per_turn
        self._steps = 0
        self.figures: list[dict[str, Figures]] = []
        self.loads: list[float] = []
        self._restart()

    def request(self) -> Request:
        """As `RayHost.request`; called once at the end of every step."""
        request = super().request()
        self._steps += 1
        if self._steps % self._steps_per_turn == 0:
            ours = {"seconds": time.perf_counter() - self._wall, "cpu_s": time.process_time() - self._cpu}
            theirs = self._bare.run(self._steps_per_turn)
            if self._steps > self._steps_per_turn:  # the first turn warms up
                self.figures.append({_RUN: ours, _BARE: theirs})
                self.loads.append(os.getloadavg()[0])
            self._restart()
        return request

    def _restart(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()


def _worker(config: dict[str, Any]) -> None:
    settings = TrainSettings.model_validate(config["settings"])
    device = prepare_process(settings.scaling.cpus_per_worker, on_gpu=False)
    with BareLoop(settings) as bare:
        host = _TurnHost(config["supervisor"], bare, settings.run.log_every)
        run_worker(settings, device, host)
    turns = json.dumps({"figures": host.figures, "loads": host.loads})
    storage.write_bytes(storage.join(run_uri(settings.run), _TURNS_NAME), turns.encode())
