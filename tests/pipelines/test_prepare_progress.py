"""What a person sees while a preparation runs, on a terminal and in a file, against a clock that the test winds."""

from __future__ import annotations

import io

import pytest

from pipelines.preparation import progress
from pipelines.preparation.progress import Progress


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def run(clock: Clock, out: io.StringIO, seconds: int, rows_per_second: int = 100) -> None:
    shown = Progress(planned=seconds * rows_per_second + 1_000, done=1_000, out=out)
    for second in range(1, seconds + 1):
        clock.now = float(second)
        shown.update(1_000 + second * rows_per_second, 7)
    shown.finish(1_000 + seconds * rows_per_second, 7)


def test_line_says_rate_and_time_left(clock: Clock) -> None:
    shown = Progress(planned=10_000, done=1_000, out=io.StringIO())
    clock.now = 20.0
    shown.update(3_000, 7)
    assert shown.line(3_000, 7) == "3,000 of 10,000 rows (30.0%), 100 rows/s, 7 quarantined, 70 s left"


def test_rate_follows_what_happens_now(clock: Clock) -> None:
    shown = Progress(planned=1_000_000, done=0, out=io.StringIO())
    for minute in range(1, 61):
        clock.now = 60.0 * minute
        shown.update(6_000 * min(minute, 30) + 600 * max(0, minute - 30), 0)  # 100 rows/s, then 10
    assert "10 rows/s" in shown.line(198_000, 0)


def test_file_gets_ever_fewer_lines(clock: Clock) -> None:
    out = io.StringIO()
    run(clock, out, seconds=8 * 3600)
    lines = out.getvalue().splitlines()
    assert 50 < len(lines) < 120
    assert lines[0].startswith("2,000 of ")  # after ten seconds
    assert lines[-1] == "2,881,000 of 2,881,000 rows (100.0%), 100 rows/s, 7 quarantined"
    assert "\r" not in out.getvalue()


def test_terminal_keeps_one_line(clock: Clock) -> None:
    out = Terminal()
    run(clock, out, seconds=30)
    assert out.getvalue().count("\n") == 1 and out.getvalue().endswith("quarantined\n")
    assert out.getvalue().count("\r") == 31  # once a second, and the end


def test_short_run_prints_its_end_once(clock: Clock) -> None:
    out = io.StringIO()
    run(clock, out, seconds=5)
    assert out.getvalue() == "1,500 of 1,500 rows (100.0%), 100 rows/s, 7 quarantined\n"
