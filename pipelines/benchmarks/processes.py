"""CPU time and peak memory of this process and of all that it has started, as Linux counts them in /proc."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread
from typing import Self

_TICKS = os.sysconf("SC_CLK_TCK")
_MIB = 1024  # the kernel counts in KiB
_LOOK_S = 1.0


@dataclass(frozen=True)
class Process:
    """A living process."""

    pid: int
    name: str
    cpu_s: float
    """User and system time."""
    peak_mib: float
    """The most memory that it has held at once, pages that it shares with others included."""

    @property
    def is_ray_worker(self) -> bool:
        """Whether it runs tasks; idle ones are named so as well."""
        return self.name.startswith("ray::") and not self.name.endswith(("Agent", "Actor"))


def process_tree() -> list[Process]:
    """This process first, then its descendants."""
    stats = {int(entry.name): _stat(entry) for entry in Path("/proc").iterdir() if entry.name.isdigit()}
    children = defaultdict(list)
    for pid, stat in stats.items():
        if stat is not None:
            children[stat[0]].append(pid)
    found, waiting = [], [os.getpid()]
    while waiting:
        pid = waiting.pop(0)
        waiting += children[pid]
        if (stat := stats.get(pid)) is not None and (peak := _peak(pid)) is not None:
            found.append(Process(pid, stat[1], stat[2], peak))
    return found


class CpuMeter:
    """CPU seconds of the whole tree while it is entered, those of processes that end meanwhile included.

    Ray does not wait for its workers, so the kernel does not add up what they used: they are looked at once a second,
    and what an ended one used after the last look is lost.

    Attributes:
        seconds: of CPU, after it was left.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._before: dict[int, float] = {}
        self._seen: dict[int, float] = {}
        self._is_over = Event()

    def __enter__(self) -> Self:
        self._look()
        self._before = dict(self._seen)
        self._thread = Thread(target=self._keep_looking, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()
        self._look()
        self.seconds = sum(cpu_s - self._before.get(pid, 0.0) for pid, cpu_s in self._seen.items())

    def _keep_looking(self) -> None:
        while not self._is_over.wait(_LOOK_S):
            self._look()

    def _look(self) -> None:
        self._seen |= {process.pid: process.cpu_s for process in process_tree()}


def machine_cpu_s() -> float:
    """CPU seconds so far, of everything on this machine since it started."""
    user, nice, system, _, _, irq, softirq = map(int, Path("/proc/stat").read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / _TICKS


def _stat(entry: Path) -> tuple[int, str, float] | None:
    """Parent, name, CPU seconds; None where the process has just ended."""
    try:
        text = (entry / "stat").read_text()
        line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return int(fields[1]), line.split(" ")[0] if line else "", sum(map(int, fields[11:13])) / _TICKS


def _peak(pid: int) -> float | None:
    try:
        found = re.search(r"^VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(found.group(1)) / _MIB if found else 0.0
