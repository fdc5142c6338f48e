"""Ranks of a training run as plain processes: gloo on the loopback, DeepSpeed, and no Ray.

A server process imports everything once and forks a child for each rank; it has no threads and no connections, so
forking it is safe. A child starts in milliseconds, where a fresh one would take ten seconds.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import socket
import time
import traceback
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from pipelines.training.compiler import build_cpu_operator

_SECONDS = 120
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.ranks_preloaded"])
_ENVIRONMENT = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


@functools.cache
def _build_operator() -> None:
    """Compile what DeepSpeed needs before any deadline runs: it takes a minute, once per environment."""
    process = _CONTEXT.Process(target=build_cpu_operator)
    process.start()
    process.join(280)
    assert process.exitcode == 0, "DeepSpeed's CPU operator was not built: see above, or it took more than 280 s"


class RankGroup:
    """Processes that run `work(rank, *arguments)` with a process group between them."""

    def __init__(self, world_size: int, work: Callable[..., None], *arguments: Any, logs: Path) -> None:
        os.environ.update(_ENVIRONMENT)  # the server inherits it when its first process starts it
        _build_operator()
        logs.mkdir(parents=True, exist_ok=True)
        self._logs = logs
        self.processes: list[BaseProcess] = []
        port = _free_port()
        for rank in range(world_size):
            store = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
            log = str(logs / f"{rank}.log")
            process = _CONTEXT.Process(target=_child, args=(rank, world_size, port, log, store, work, arguments))
            process.start()
            self.processes.append(process)

    def wait(self) -> list[int]:
        """Exit codes, once all processes have ended; whoever has not by the deadline is killed, and the test fails."""
        deadline = time.monotonic() + _SECONDS
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
        late = [rank for rank, process in enumerate(self.processes) if process.is_alive()]
        for process in self.processes:
            process.kill()
            process.join()
        assert not late, f"ranks {late} did not end within {_SECONDS} s:\n{self.said()[-4000:]}"
        return [process.exitcode or 0 for process in self.processes]

    def said(self) -> str:
        """What the ranks wrote, one after the other."""
        logs = [self._logs / f"{rank}.log" for rank in range(len(self.processes))]
        return "\n".join(log.read_text() for log in logs if log.exists())


def run_ranks(world_size: int, work: Callable[..., None], *arguments: Any, logs: Path) -> str:
    """Run `work` on ranks that all must succeed; returns what they wrote."""
    group = RankGroup(world_size, work, *arguments, logs=logs)
    codes = group.wait()
    assert codes == [0] * world_size, f"exit codes {codes}:\n{group.said()[-6000:]}"
    return group.said()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _child(
    rank: int,
    world_size: int,
    port: int,
    log: str,
    store: dict[str, str],
    work: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(_ENVIRONMENT | store)
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world_size)
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    import torch.distributed as dist

    dist.init_process_group("gloo")
    try:
        work(rank, *arguments)
    except BaseException:
        traceback.print_exc()
        # At once: the other ranks wait for this one, and would for ever if it tidied up first.
        os._exit(1)
    dist.barrier()
    dist.destroy_process_group()
