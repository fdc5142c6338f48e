"""Steps of a training run on one device, in a process of its own: their rate, and then their parts.

It takes settings as JSON and the path of its answer on its command line. A worker of `jobs/train.py` does the same
steps; Ray, checkpoints and the export are left out. First steps run as in a run and give rate, MFU and memory; then
some more are timed part by part, for which the device is waited for at every border, so that they take a little longer.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipelines.feed import MicroBatch, Position, PreparedRows
from pipelines.training.host import Host
from pipelines.training.loop import WorkerRun, grouped_by_step
from pipelines.training.memory import MemoryPlanError
from pipelines.training.metrics import StepMeter
from pipelines.training.process import prepare_process, worker_environment
from pipelines.training.ranks import Ranks
from pipelines.training.settings import TrainSettings
from pipelines.training.start import load_processor
from pipelines.training.watchdog import Watchdog

WARM_UP = 2
"""Steps that count nowhere: the optimizer's state and the allocator's blocks come into being."""


def time_steps(settings: TrainSettings) -> dict[str, Any]:
    """Run `settings.max_steps` steps in a new process.

    Returns:
        `figures`, those of a log line; `parts`, seconds of a step by name; `peak`, where the peak comes from.

    Raises:
        ValueError: the process failed; its own words are on stderr.
    """
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "answer.json"
        on_gpu = settings.scaling.gpus_per_worker > 0
        command = [sys.executable, "-m", __name__, settings.model_dump_json(), str(answer)]
        environment = worker_environment(settings.scaling.cpus_per_worker, on_gpu)
        environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # DeepSpeed asks for them
        status = subprocess.run(command, env=os.environ | environment).returncode
        if status:
            raise ValueError(f"recipe {settings.run.name}: the process ended with exit code {status}, see above")
        return json.loads(answer.read_text())


def _measure(settings: TrainSettings) -> dict[str, Any]:
    on_gpu = settings.scaling.gpus_per_worker > 0
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    if on_gpu:
        device = torch.device("cuda", 0)
        torch.cuda.set_device(device)
    else:
        device = prepare_process(settings.scaling.cpus_per_worker, on_gpu=False)
    rows, ranks = PreparedRows(settings.data.folders), Ranks(settings.run.start_timeout_s)
    processor = load_processor(settings.model)
    with Watchdog(ranks, settings.run.hang_timeout_s, settings.run.start_timeout_s) as watchdog:
        run = WorkerRun(settings, processor, rows, device, Host(), ranks, watchdog)
        num_steps = run.num_steps
        with run.loader(Position(), num_steps) as loader:
            steps = enumerate(grouped_by_step(loader))
            meter = StepMeter(device, run.flops, run.peak.tflops)
            _take(run, steps, WARM_UP, meter)
            meter.read(loader.waited_s, 0.0, None)
            num_timed = (num_steps - WARM_UP) // 2
            _take(run, steps, num_timed, meter)
            _wait(device)
            figures = meter.read(loader.waited_s, 0.0, None)
            stopwatch = _Stopwatch(run, device)
            waited, start = loader.waited_s, time.perf_counter()
            _take(run, steps, num_timed, meter)
            _wait(device)
            whole = time.perf_counter() - start
            stopwatch.seconds["wait for data"] = loader.waited_s - waited
    parts = {name: seconds / num_timed for name, seconds in stopwatch.seconds.items()}
    return {"figures": figures, "parts": parts | {"step": whole / num_timed}, "peak": run.peak._asdict()}


def _take(run: WorkerRun, steps: Iterator[tuple[int, list[MicroBatch]]], count: int, meter: StepMeter) -> None:
    for _ in range(count):
        step, micro_batches = next(steps)
        run.watchdog.beat("trains")
        run.step(step, micro_batches, meter)
        meter.add_step(micro_batches[-1].batch)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Stopwatch:
    """Times forward pass, the tower's share of it, backward pass and update of every step from now on."""

    def __init__(self, run: WorkerRun, device: torch.device) -> None:
        self.seconds = dict.fromkeys(("forward pass", "of it the tower", "backward pass", "update"), 0.0)
        self._device = device
        self._started: dict[str, float] = {}
        self._watch(run.engine.module, "forward pass")
        self._watch(run.engine.module.model.vision_tower, "of it the tower")
        run.engine.backward = self._timed("backward pass", run.engine.backward)
        run.engine.step = self._timed("update", run.engine.step)

    def _watch(self, module: torch.nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda *_: self._start(name))
        module.register_forward_hook(lambda *_: self._stop(name))

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._start(name)
            result = call(*args, **kwargs)
            self._stop(name)
            return result

        return timed

    def _start(self, name: str) -> None:
        _wait(self._device)
        self._started[name] = time.perf_counter()

    def _stop(self, name: str) -> None:
        _wait(self._device)
        self.seconds[name] += time.perf_counter() - self._started[name]


def _main(dumped: str, answer: str) -> int:
    try:
        found = _measure(TrainSettings.model_validate_json(dumped))
    except (MemoryPlanError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    Path(answer).write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
