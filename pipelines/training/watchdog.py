"""Finds out which rank of a run hangs, says so, and ends the process, so that the run is restarted.

When one rank stops, all others wait for it in their next collective, for as long as the process group allows, and what
they then say names the wrong one. Here a thread of each rank watches its own training thread. Once nothing has moved
for `timeout_s`, the rank writes down where its training thread stands; those inside a collective are waiting for
others; those elsewhere, and those that write nothing, are what they wait for.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import FrameType

import torch.distributed as dist

from pipelines.training.ranks import Ranks

HUNG_EXIT_CODE = 76
"""What a worker's process ends with when the run hangs."""
_SLOWEST_S = 15.0
"""How long after the first a last rank may notice; ranks stop within a step of each other."""
_HEAD_START_S = 2.0
"""The one that speaks ends first: the first end brings down all others."""
_COLLECTIVES = (f"{os.sep}torch{os.sep}distributed{os.sep}", f"{os.sep}deepspeed{os.sep}comm{os.sep}")
_SILENT = "gives no sign of life: its process is stopped, dead or out of reach"


class Watchdog:
    """Watches the thread that creates it. Create on every rank; use as a context manager.

    Args:
        ranks: All ranks.
        timeout_s: Seconds without a `beat` after which the run counts as hung. Longer than the slowest step or save.
        start_timeout_s: The same until the first beat: loading a model and a checkpoint takes longer than a step.
        tell: Given the verdict on who hangs, by one rank.
    """

    def __init__(
        self, ranks: Ranks, timeout_s: float, start_timeout_s: float, tell: Callable[[str], None] = lambda verdict: None
    ) -> None:
        self._rank, self._world_size = ranks.rank, ranks.world_size
        self._timeout_s = timeout_s
        self._allowed_s = start_timeout_s
        self._thread_id = threading.get_ident()
        self._phase, self._last = "starts", time.monotonic()
        self._stop = threading.Event()
        self._tell = tell
        host = os.environ.get("MASTER_ADDR", "127.0.0.1")
        wait = timedelta(seconds=max(30.0, timeout_s))
        # A store of its own: the process group's may be what hangs.
        store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False) if ranks.rank == 0 else None
        port = ranks.share(store.port if store else 0)
        self._store = store or dist.TCPStore(host, port, is_master=False, wait_for_workers=False, timeout=wait)
        self._watcher = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._watcher.join()

    def beat(self, phase: str) -> None:
        """The training thread moves on, to `phase`."""
        self._phase, self._last, self._allowed_s = phase, time.monotonic(), self._timeout_s

    def _watch(self) -> None:
        while not self._stop.wait(min(1.0, self._timeout_s / 10)):
            if time.monotonic() - self._last > self._allowed_s:
                self._give_up()

    def _give_up(self) -> None:
        place = _standing(sys._current_frames()[self._thread_id])
        try:
            self._store.set(f"{self._rank}", f"{place}, while it {self._phase}")
            places = self._read_all(time.monotonic() + min(_SLOWEST_S, self._timeout_s))
        except (RuntimeError, dist.DistError) as error:  # the process that holds the store is gone
            places = {self._rank: place, 0: f"{_SILENT} ({error})"}
        if self._stop.is_set():
            return
        if self._rank == min(rank for rank, place in places.items() if not place.startswith(_SILENT)):
            why = verdict(places, self._world_size, self._allowed_s)
            print(f"error: {why}", file=sys.stderr, flush=True)
            self._tell(why)
        else:
            time.sleep(_HEAD_START_S)
        os._exit(HUNG_EXIT_CODE)  # the training thread cannot be reached

    def _read_all(self, deadline: float) -> dict[int, str]:
        missing = set(range(self._world_size))
        while missing and time.monotonic() < deadline:
            missing = {rank for rank in missing if not self._store.check([f"{rank}"])}
            self._stop.wait(0.1)
        return {
            rank: _SILENT if rank in missing else self._store.get(f"{rank}").decode()
            for rank in range(self._world_size)
        }


def verdict(places: dict[int, str], world_size: int, timeout_s: float) -> str:
    """Who hangs, from where each rank says that it stands."""
    waiting = [rank for rank, place in places.items() if place.startswith("waits for the others")]
    hanging = [f"rank {rank} {place}" for rank, place in places.items() if rank not in waiting]
    who = "; ".join(hanging) if hanging else f"all {world_size} ranks wait for each other: {places[waiting[0]]}"
    others = f"; {len(waiting)} of {world_size} ranks wait for it" if hanging and waiting else ""
    return (
        f"no step of this run has moved for {timeout_s:g} s (run.hang_timeout_s): {who}{others}. "
        "Its processes end, and the run is restarted from its last checkpoint"
    )


def _standing(frame: FrameType) -> str:
    """Where a thread stands, in words."""
    place = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"
    file = frame.f_code.co_filename
    # A wrapper of torch's may be innermost; what matters is whether a collective is what runs.
    inner = [file, frame.f_back.f_code.co_filename if frame.f_back else ""]
    if any(mark in name for mark in _COLLECTIVES for name in inner):
        return f"waits for the others ({place})"
    return f"hangs at {place}"
