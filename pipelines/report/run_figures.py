"""Metrics of a run -> windows, stalls, where the time went, throughput. Nothing in here reads a file."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from pipelines.report.curves import short
from pipelines.report.run_contents import History, Stall, TimeUse, Window
from pipelines.report.templates import duration

_SLOW = 1.5
"""A window whose steps take so many times the median is a stall."""
_WAITS = 0.1
"""So is one that waits for data for such a share of its time, where that is also far above the usual share."""
_FEWEST = 3
"""Of fewer windows none is typical."""
_SHOWN = 12


def windows_of(lines: Sequence[Mapping[str, float]], history: History) -> list[Window]:
    """The stretches of steps that the lines of a run stand for."""
    starts = {attempt.step: attempt.world_size for attempt in history.attempts}
    world_size = 1
    windows: list[Window] = []
    for line in lines:
        before = windows[-1].last if windows else 0
        last = int(line["step"])
        # An attempt begins its first window where it begins, wherever the line before was.
        begun = max((start for start in starts if before <= start < last), default=None)
        first = (before if begun is None else begun) + 1
        world_size = world_size if begun is None else starts[begun]
        seconds = line["seconds_per_step"] * (last - first + 1)
        windows.append(Window(first, last, seconds, line, world_size, starts_attempt=begun is not None))
    return windows


def stalls_of(windows: Sequence[Window]) -> list[Stall]:
    """The windows that lost most time, with what the figures say of the cause."""
    stalls = []
    for world_size in {window.world_size for window in windows}:
        # Fewer workers take longer, which is no stall.
        stalls += _stalls_among([window for window in windows if window.world_size == world_size])
    worst = sorted(stalls, key=lambda stall: stall.lost, reverse=True)[:_SHOWN]
    return sorted(worst, key=lambda stall: stall.window.first)


def _stalls_among(windows: Sequence[Window]) -> list[Stall]:
    if len(windows) < _FEWEST:
        return []
    typical = median(windows, "seconds_per_step")
    usual_wait = median(windows, "data_wait_share")
    stalls = []
    for window in windows:
        slow = window.figures["seconds_per_step"] > _SLOW * typical
        waits = window.figures.get("data_wait_share", 0.0) > max(_WAITS, 3 * usual_wait)
        if slow or waits:
            lost = max(0.0, window.seconds - window.steps * typical)
            stalls.append(Stall(window, typical, lost, _cause(window)))
    return stalls


def time_uses(windows: Sequence[Window], history: History) -> list[TimeUse]:
    """What the time went into during which jobs of this run existed."""
    waiting = sum(window.seconds * window.figures.get("data_wait_share", 0.0) for window in windows)
    saving = sum(window.figures.get("checkpoint_s", 0.0) for window in windows)
    stepping = sum(window.seconds for window in windows)
    computing = max(0.0, stepping - waiting - saving)
    total = max(history.seconds, stepping)
    if not total:
        return []
    uses = [
        ("steps that count", computing, "accent"),
        ("waiting for data", waiting, "wrong"),
        ("waiting for checkpoints", saving, "third"),
        ("starts, export, steps done again", total - computing - waiting - saving, "neutral"),
    ]
    return [TimeUse(name, seconds, seconds / total, colour) for name, seconds, colour in uses]


def throughput_of(windows: Sequence[Window], history: History) -> dict[str, str]:
    """Rates of a typical window, and what the whole run came to."""
    if not windows:
        return {}
    medians = {name: median(windows, name) for name in windows[-1].figures}
    facts = {
        "a step takes": f"{medians['seconds_per_step']:.3g} s (median)",
        "samples": f"{short(medians['samples_per_s'])} a second while it steps",
        "tokens": f"{short(medians['tokens_per_s'])} a second while it steps",
    }
    samples = windows[-1].figures.get("samples_seen")
    if samples and history.seconds:
        facts["over all"] = (
            f"{int(samples):,} samples in {duration(history.seconds)}, {short(samples / history.seconds)} a second "
            "with starts, checkpoints and restarts"
        )
    if "tflops_vision" in medians:
        facts["model FLOPs"] = (
            f"{medians['tflops_vision'] + medians['tflops_language']:.3g} TFLOP/s a worker, "
            f"{medians['tflops_vision']:.3g} of them vision; recomputation and padding are not counted"
        )
    if history.attempts and history.attempts[-1].peak:
        peak = history.attempts[-1].peak
        facts["peak of a worker"] = f"{peak['tflops']:.4g} TFLOP/s, {peak['source']}"
    return facts


def median(windows: Sequence[Window], name: str) -> float:
    """The median of a figure over the windows that have it; 0 where none has."""
    return statistics.median([window.figures[name] for window in windows if name in window.figures] or [0.0])


def _cause(window: Window) -> str:
    figures, causes = window.figures, []
    if figures.get("data_wait_share", 0.0) > _WAITS:
        causes.append(f"waited for data {figures['data_wait_share']:.0%} of the time")
    elif figures.get("data_wait_share_max", 0.0) > _WAITS:
        causes.append(f"one worker waited for data {figures['data_wait_share_max']:.0%} of the time")
    if (saving := figures.get("checkpoint_s", 0.0)) > 0.1 * window.seconds:
        causes.append(f"waited {saving:.1f} s for a checkpoint")
    if window.starts_attempt:
        causes.append("first steps after a start")
    return ", ".join(causes) or "neither data nor a checkpoint: look at the machines"
