"""Loss curves as inline SVG that follows the page's colours."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from pipelines.report.contents import Stage

# Matplotlib writes literal colours; these stand for the page's, and are replaced by CSS variables afterwards.
_STAND_INS = {
    "#010101": "var(--muted)",
    "#020202": "var(--rule)",
    "#030303": "var(--accent)",
    "#040404": "var(--faint)",
}


def loss_curve(stage: Stage) -> str:
    """An `<svg>` element with the loss as it was logged and its running mean."""
    # Text stays text: it takes the page's font, can be selected, and keeps the file small.
    style: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": stage.name,
        "font.family": "sans-serif",
        "font.size": 10,
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(5.4, 3.0), layout="constrained")
        axes = figure.subplots()
        axes.plot(stage.steps, stage.losses, color="#040404", linewidth=0.8)
        axes.plot(stage.steps, running_mean(stage.losses), color="#030303", linewidth=2.0, solid_capstyle="round")
        axes.set_xlabel("step", color="#010101")
        axes.set_ylabel("loss", color="#010101")
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
        axes.tick_params(colors="#010101", length=0)
        axes.grid(axis="y", color="#020202", linewidth=0.8)
        axes.set_axisbelow(True)
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.spines["bottom"].set_color("#020202")
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _for_the_page(buffer.getvalue(), f"Loss of the stage {stage.name} over its steps")


def running_mean(values: Sequence[float]) -> np.ndarray:
    """float64[N]: each value averaged with its neighbours, over a window of a twentieth of the curve."""
    if len(values) == 0:
        return np.empty(0)
    reach = max(1, len(values) // 40)
    sums = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - reach, 0), np.minimum(index + reach + 1, len(values))
    return (sums[high] - sums[low]) / (high - low)


def _for_the_page(document: str, label: str) -> str:
    svg = document[document.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Without a fixed width and height it takes the width it is given.
    svg = re.sub(r'^<svg ([^>]*?)width="[^"]*"', r"<svg \1", svg, count=1)
    svg = re.sub(r'^<svg ([^>]*?)height="[^"]*"', r"<svg \1", svg, count=1)
    for literal, variable in _STAND_INS.items():
        svg = svg.replace(literal, variable)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
