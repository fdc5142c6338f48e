"""CPU time and peak memory of this process and of all that it has started, as Linux counts them in /proc."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

_TICKS = os.sysconf("SC_CLK_TCK")
_MIB = 1024  # the kernel counts in KiB


@dataclass(frozen=True)
class Process:
    """A living process."""

    pid: int
    name: str
    cpu_s: float
    """User and system time, its finished children included."""
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


def tree_cpu_s() -> float:
    """CPU seconds so far, of the whole tree."""
    return sum(process.cpu_s for process in process_tree())


def _stat(entry: Path) -> tuple[int, str, float] | None:
    """Parent, name, CPU seconds; None where the process has just ended."""
    try:
        text = (entry / "stat").read_text()
        line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return int(fields[1]), line.split(" ")[0] if line else "", sum(map(int, fields[11:15])) / _TICKS


def _peak(pid: int) -> float | None:
    try:
        found = re.search(r"^VmHWM:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(found.group(1)) / _MIB if found else 0.0
