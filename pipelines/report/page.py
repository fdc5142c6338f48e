"""Report -> one HTML file that needs nothing from outside."""

from __future__ import annotations

import base64
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from pipelines.report.contents import Report
from pipelines.report.curves import loss_curve
from pipelines.report.findings import describe_stage, judge, margin


def render(report: Report) -> str:
    """The page as HTML. Everything in the report is text and gets escaped, the model's answers above all."""
    environment = Environment(
        loader=PackageLoader("pipelines.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, duration=duration, data_uri=_data_uri)
    return environment.get_template("page.html.jinja").render(
        report=report,
        rows=[*report.scores, report.overall],
        findings=[judge(score) for score in report.scores],
        curves=[(stage, Markup(loss_curve(stage)), describe_stage(stage)) for stage in report.stages],
        margin=margin,
        total_seconds=sum(step.seconds for step in report.steps),
        all_met=all(goal.is_met for goal in report.goals),
    )


def write_report(report: Report, path: str | Path) -> None:
    """Write the page; a reader never sees half of it."""
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(render(report), "utf-8")
    partial.replace(path)


def duration(seconds: float) -> str:
    """ "0.8 s", "42 s" or "3 min 07 s"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _data_uri(data: bytes) -> str:
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
