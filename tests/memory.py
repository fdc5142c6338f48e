"""How much memory a piece of work needs, in this process, libraries in C included."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def peak_growth(work: Callable[[], Any]) -> int:
    """By how many bytes the resident memory of this process is higher at its peak during `work` than before."""
    if not _CLEAR.exists():
        pytest.skip("needs Linux's /proc")
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed but kept would hide what `work` takes
    _CLEAR.write_text("5")  # the peak begins anew
    before = _resident("VmRSS")
    work()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    [line] = [line for line in _STATUS.read_text().splitlines() if line.startswith(field + ":")]
    return int(line.split()[1]) * 1024
