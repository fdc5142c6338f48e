"""What the quickstart's report says, as text for the terminal."""

from __future__ import annotations

from pathlib import Path

from pipelines.report.contents import Picture, Report
from pipelines.report.templates import duration


def describe_conversation(picture: Picture) -> str:
    """What was asked about `picture`, what was said, and whether it is right."""
    lines = [f"  {picture.name}.jpg"]
    for reply in picture.replies:
        verdict = "right" if reply.is_right else f"wrong: {reply.truth}"
        lines.append(f"    {reply.question}  ->  {reply.answer}  ({verdict})")
    return "\n".join(lines)


def summarize(report: Report, path: Path) -> str:
    """Times, accuracy and goals as text."""
    lines = ["", f"{'step':<20}{'time':>14}"]
    lines += [f"{step.name:<20}{duration(step.seconds):>14}" for step in report.steps]
    lines += [f"{'total':<20}{duration(sum(step.seconds for step in report.steps)):>14}", ""]
    lines += [f"{'held-out accuracy':<20}{'pictures':>10}{'blank':>10}{'majority':>10}{'questions':>11}"]
    lines += [
        f"{score.question_type:<20}{score.accuracy:>10.1%}{score.blank:>10.1%}{score.majority:>10.1%}"
        f"{score.num_questions:>11}"
        for score in [*report.scores, report.overall]
    ]
    lines += [""] + [
        f"{'met' if goal.is_met else 'NOT MET'}: {goal.measured:.1f} {goal.name} (at least {goal.wanted:g} wanted)"
        for goal in report.goals
    ]
    return "\n".join([*lines, "", f"report: {path}"])
