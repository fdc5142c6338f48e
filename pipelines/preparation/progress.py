"""How a preparation under way is doing, for a person who waits for it.

On a terminal one line is kept up to date. In a file or a pipe a line appears now and then, ever less often: a night's
work leaves some hundred lines, not ten thousand.
"""

from __future__ import annotations

import sys
import time
from collections import deque
from typing import TextIO

_TERMINAL_INTERVAL = 1.0  # seconds
_FIRST_INTERVAL, _LAST_INTERVAL = 10.0, 300.0  # seconds between lines in a file
_RATE_WINDOW = 120.0  # seconds: long enough to smooth over chunks, short enough to follow a store that slows down
_CLEAR = "\r\x1b[K"  # to the line's beginning, and erase it


class Progress:
    """Prints rows, rows/s, quarantined rows and the time left.

    Args:
        planned: rows of the whole preparation.
        done: rows that earlier runs have accounted for; they do not count for the rate.
        out: where to; standard output by default.
    """

    def __init__(self, planned: int, done: int, out: TextIO | None = None) -> None:
        self.planned = planned
        self._out = out or sys.stdout
        self._on_terminal = self._out.isatty()
        self._interval = _TERMINAL_INTERVAL if self._on_terminal else _FIRST_INTERVAL
        now = time.monotonic()
        self._last_line = now
        self._seen = deque([(now, done)])
        self._is_open = False

    def update(self, done: int, quarantined: int) -> None:
        """Report that `done` rows are accounted for; prints if the last line is long enough ago."""
        now = time.monotonic()
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[0][0] > _RATE_WINDOW:
            self._seen.popleft()
        if now - self._last_line < self._interval:
            return
        self._last_line = now
        self._print(self.line(done, quarantined))

    def finish(self, done: int, quarantined: int) -> None:
        """Print the last line, and end it: whatever comes next begins on a line of its own."""
        self._print(self.line(done, quarantined))
        if self._is_open:
            print(file=self._out, flush=True)
        self._is_open = False

    def line(self, done: int, quarantined: int) -> str:
        """The line for `done` rows, with the rate of the last two minutes."""
        (then, before), (now, latest) = self._seen[0], self._seen[-1]
        rate = (latest - before) / (now - then) if now > then else 0.0
        left = f", {_duration((self.planned - done) / rate)} left" if rate > 0 and done < self.planned else ""
        share = done / self.planned
        return f"{done:,} of {self.planned:,} rows ({share:.1%}), {rate:,.0f} rows/s, {quarantined:,} quarantined{left}"

    def _print(self, line: str) -> None:
        if self._on_terminal:
            print(f"{_CLEAR}{line}", end="", file=self._out, flush=True)
            self._is_open = True
            return
        print(line, file=self._out, flush=True)
        self._interval = min(1.5 * self._interval, _LAST_INTERVAL)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
