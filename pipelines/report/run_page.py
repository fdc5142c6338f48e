"""The report of a training run: one HTML file in the run's folder that needs nothing from outside."""

from __future__ import annotations

from datetime import UTC, datetime

from markupsafe import Markup

from pipelines import storage
from pipelines.report.run_contents import RunReport
from pipelines.report.run_sources import run_report
from pipelines.report.templates import duration, page_template

REPORT_NAME = "report.html"


def write_run_report(run_uri: str) -> str:
    """Make the report of the run in `run_uri` from its files, and put it there; returns where it is.

    Raises:
        FileNotFoundError: There is no run in this folder.
    """
    report = run_report(run_uri)
    uri = storage.join(report.run_uri, REPORT_NAME)
    storage.write_bytes(uri, render_run(report).encode())
    return uri


def render_run(report: RunReport) -> str:
    """The page as HTML. Everything in the report is text and gets escaped, but for the curves."""
    template = page_template("run_page.html.jinja")
    template.globals.update(moment=moment, clock=clock)
    return template.render(
        report=report,
        history=report.history,
        curves=[(panel, Markup(panel.svg)) for panel in report.panels],
        lead=lead(report),
    )


def lead(report: RunReport) -> str:
    """The run in a sentence or two."""
    history = report.history
    if not history.attempts:
        return f"{report.step:,} steps, and no record of its attempts." if report.step else "No worker has begun yet."
    attempt = history.attempts[-1]
    devices = sorted({device for _, device in attempt.machines})
    hosts = len({name for name, _ in attempt.machines})
    where = f"{attempt.world_size} worker{'s' if attempt.world_size > 1 else ''} ({', '.join(devices)})"
    where += f" on {hosts} machines" if hosts > 1 else ""
    return f"{report.step:,} of {report.num_steps:,} steps in {duration(history.seconds)}, on {where}."


def moment(time: float | None) -> str:
    """A time as date and minute, UTC."""
    return datetime.fromtimestamp(time, UTC).strftime("%Y-%m-%d %H:%M UTC") if time is not None else "never"


def clock(time: float) -> str:
    """A time as day and second, UTC."""
    return datetime.fromtimestamp(time, UTC).strftime("%d %b %H:%M:%S")
