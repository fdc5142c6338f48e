"""Report -> one HTML file that needs nothing from outside."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from pipelines.report.contents import Report
from pipelines.report.curves import loss_curve
from pipelines.report.findings import describe_stage, judge, margin
from pipelines.report.templates import page_template


def render(report: Report) -> str:
    """The page as HTML. Everything in the report is text and gets escaped, the model's answers above all."""
    return page_template("page.html.jinja").render(
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
