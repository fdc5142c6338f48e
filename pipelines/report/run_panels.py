"""Metrics of a run -> one curve for each figure, whatever figures there are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipelines.report.curves import LINE_COLOURS, Points, curve, running_mean, short
from pipelines.report.run_contents import Panel

_MOST_POINTS = 800


@dataclass(frozen=True)
class _Kind:
    """A panel that is known: further figures get one of their own each."""

    title: str
    names: Sequence[str]
    """Figures, or their beginnings where they end in an underscore."""
    from_zero: bool = True
    is_share: bool = False


_KNOWN = (
    _Kind("Loss", ["loss"], from_zero=False),
    _Kind("Learning rate", ["lr", "lr_"]),
    _Kind("Gradient norm", ["grad_norm"]),
    _Kind("Samples a second", ["samples_per_s"]),
    _Kind("Tokens a second", ["tokens_per_s"]),
    _Kind("MFU", ["mfu", "mfu_vision", "mfu_language"], is_share=True),
    _Kind("Seconds a step", ["seconds_per_step"]),
    _Kind("Waiting for data", ["data_wait_share", "data_wait_share_max"], is_share=True),
    _Kind("Padding", ["padding_share"], is_share=True),
    _Kind("Memory, GiB", ["memory_gib"]),
    _Kind("Waiting for checkpoints, s", ["checkpoint_s"]),
)
_LINES = {
    "mfu": "both",
    "mfu_vision": "vision",
    "mfu_language": "language",
    "data_wait_share": "mean of the workers",
    "data_wait_share_max": "slowest worker",
    "lr": "highest",
}
_NO_CURVE = ("step", "time", "epoch", "samples_seen", "seconds_left", "tflops_vision", "tflops_language")


def panels_of(lines: Sequence[Mapping[str, float]], restarts: Sequence[int]) -> list[Panel]:
    """A panel for each kind of figure in the lines of a run; `restarts` are the steps that attempts began at."""
    names = list(dict.fromkeys(name for line in lines for name in line if name not in _NO_CURVE))
    panels = []
    for kind in _KNOWN:
        shown = [name for known in kind.names for name in names if _belongs(name, known)]
        if shown:
            panels.append(_panel(kind, {name: _points(lines, name) for name in shown}, restarts))
        names = [name for name in names if name not in shown]
    for name in names:
        kind = _Kind(name.replace("_", " ").capitalize(), [name], from_zero=False)
        panels.append(_panel(kind, {name: _points(lines, name)}, restarts))
    return [panel for panel in panels if panel is not None]


def thinned(steps: Sequence[float], values: Sequence[float]) -> Points:
    """At most a few hundred points: of each stretch its lowest and its highest, so that no peak is lost."""
    if len(steps) <= _MOST_POINTS:
        return steps, values
    kept = {0, len(steps) - 1}
    length = 2 * len(steps) / _MOST_POINTS
    for number in range(_MOST_POINTS // 2):
        stretch = range(int(number * length), min(len(steps), int((number + 1) * length)))
        if stretch:
            kept |= {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}
    order = sorted(kept)
    return [steps[index] for index in order], [values[index] for index in order]


def _panel(kind: _Kind, lines: Mapping[str, Points], restarts: Sequence[int]) -> Panel | None:
    lines = {name: points for name, points in lines.items() if points[0]}
    if not lines:
        return None
    drawn = {name: thinned(*points) for name, points in lines.items()}
    svg = curve(f"{kind.title} over steps", drawn, restarts, "", kind.from_zero, kind.is_share)
    values = next(iter(lines.values()))[1]
    end = short(float(running_mean(values)[-1]), kind.is_share)
    note = f"{end} at the end, {short(min(values), kind.is_share)} to {short(max(values), kind.is_share)}"
    colours = [LINE_COLOURS[number % len(LINE_COLOURS)] for number in range(len(lines))]
    keys = [(colour, _LINES.get(name, name.removeprefix("lr_"))) for colour, name in zip(colours, lines, strict=True)]
    return Panel(kind.title, note, svg, keys if len(keys) > 1 else [])


def _points(lines: Sequence[Mapping[str, float]], name: str) -> Points:
    # A figure that is no number has no place on a curve; the journal names its step.
    held = [line for line in lines if isinstance(line.get(name), int | float) and math.isfinite(line[name])]
    return [line["step"] for line in held], [line[name] for line in held]


def _belongs(name: str, known: str) -> bool:
    return name.startswith(known) if known.endswith("_") else name == known
