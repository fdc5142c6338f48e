"""Curves over steps as inline SVG that follows the page's colours."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from pipelines.report.contents import Stage

# Matplotlib writes literal colours; these stand for the page's, and are replaced by CSS variables afterwards.
_STAND_INS = {
    "#010101": "var(--muted)",
    "#020202": "var(--rule)",
    "#030303": "var(--accent)",
    "#040404": "var(--faint)",
    "#050505": "var(--second)",
    "#060606": "var(--third)",
    "#070707": "var(--wrong)",
}
_MUTED, _RULE, _ACCENT, _FAINT, _SECOND, _THIRD, _WRONG = _STAND_INS
LINE_COLOURS = ("accent", "second", "third")
"""CSS variables of the first lines of a curve; further ones begin again."""
_SMOOTHED_FROM = 40
"""A single line of so many points is drawn faint, with its running mean over it."""
# Fixed: a layout that measures its text first takes ten times as long to draw. Left, bottom, width, height.
_AXES = (0.115, 0.16, 0.87, 0.8)

Points = tuple[Sequence[float], Sequence[float]]
"""Steps, and a value at each."""


def loss_curve(stage: Stage) -> str:
    """An `<svg>` element with the loss as it was logged and its running mean."""
    label = f"Loss of the stage {stage.name} over its steps"
    return curve(label, {"loss": (stage.steps, stage.losses)}, y_label="loss", from_zero=True, smooth_from=0)


def curve(
    label: str,
    lines: Mapping[str, Points],
    marks: Sequence[float] = (),
    y_label: str = "",
    from_zero: bool = False,
    is_share: bool = False,
    smooth_from: int = _SMOOTHED_FROM,
) -> str:
    """An `<svg>` element with one or several lines over steps.

    Args:
        label: What it shows, for those who do not see it; no two curves of a page share it.
        lines: Name -> points, in the order of `LINE_COLOURS`.
        marks: Steps at which something happened.
        y_label: What stands at the upright axis.
        from_zero: Whether that begins at 0.
        is_share: Whether its values are shares, to be shown as percentages.
        smooth_from: A single line of at least so many points gets a running mean.
    """
    # Text stays text: it takes the page's font, can be selected, and keeps the file small.
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": label,
        "font.family": "sans-serif",
        "font.size": 10,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.4, 3.0))
        left = 0.045 if y_label else 0.0
        axes = figure.add_axes((_AXES[0] + left, _AXES[1], _AXES[2] - left, _AXES[3]))
        for mark in marks:
            axes.axvline(mark, color=_WRONG, linewidth=0.9, linestyle=(0, (2, 3)))
        _draw(axes, list(lines.values()), smooth_from)
        axes.set_xlabel("step", color=_MUTED)
        axes.set_ylabel(y_label, color=_MUTED)
        if from_zero:
            axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda step, _: f"{step:,.0f}"))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value, is_share)))
        axes.tick_params(colors=_MUTED, length=0)
        axes.grid(axis="y", color=_RULE, linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color(_RULE)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_the_page(buffer.getvalue(), label)


def running_mean(values: Sequence[float]) -> np.ndarray:
    """float64[N]: each value averaged with its neighbours, over a window of a twentieth of the curve."""
    if len(values) == 0:
        return np.empty(0)
    reach = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def short(value: float, is_share: bool = False) -> str:
    """A figure in few characters: "12.5k", "2e-05", "0.31", "45 %"."""
    if is_share:
        return f"{100 * value:.3g} %"
    for least, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if abs(value) >= least:
            return f"{value / unit:.3g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _draw(axes: Any, lines: Sequence[Points], smooth_from: int) -> None:
    colours = (_ACCENT, _SECOND, _THIRD)
    if len(lines) == 1 and len(lines[0][0]) >= smooth_from:
        steps, values = lines[0]
        axes.plot(steps, values, color=_FAINT, linewidth=0.8)
        axes.plot(steps, running_mean(values), color=_ACCENT, linewidth=2.0, solid_capstyle="round")
        return
    for number, (steps, values) in enumerate(lines):
        marker = "o" if len(steps) < 8 else ""
        axes.plot(steps, values, color=colours[number % len(colours)], linewidth=1.5, marker=marker, markersize=3.5)


def _for_the_page(document: str, label: str) -> str:
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Without a fixed width and height it takes the width it is given.
    svg = re.sub(r'^<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'^<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
    for literal, variable in _STAND_INS.items():
        svg = svg.replace(literal, variable)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(label)}" ', 1)
