"""The machine and the versions that a figure was measured with: without them it is no figure."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path

import torch
from pydantic import BaseModel

_PACKAGES = ("torch", "transformers", "ray", "pyarrow", "pillow", "numpy", "s3fs", "deepspeed")


class Machine(BaseModel):
    """Where and with what a benchmark ran."""

    time: str
    cpu: str
    cores: int
    """That this process may use."""
    memory_gib: float
    gpus: list[str]
    torch_threads: int
    load_average: list[float]
    """Of the last 1, 5 and 15 minutes before the benchmark began: 0 on a machine that has nothing else to do."""
    python: str
    versions: dict[str, str]


def describe_machine() -> Machine:
    """This machine, now."""
    return Machine(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=_cpu(),
        cores=num_cores(),
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        gpus=[torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        torch_threads=torch.get_num_threads(),
        load_average=[round(load, 2) for load in os.getloadavg()],
        python=platform.python_version(),
        versions={name: version for name in _PACKAGES if (version := _version(name))},
    )


def num_cores() -> int:
    """Cores that this process may use, which a container or `taskset` makes fewer than the machine has."""
    return len(os.sched_getaffinity(0))


def _cpu() -> str:
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
