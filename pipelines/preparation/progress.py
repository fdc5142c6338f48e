"""One line now and then about a preparation under way, for a person who waits for it."""

from __future__ import annotations

import time

_SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Prints rows, rows/s, quarantined rows and the time left.

    Args:
        planned: rows of the whole preparation.
        done: rows that earlier runs have accounted for; they do not count for the rate.
    """

    def __init__(self, planned: int, done: int) -> None:
        self.planned = planned
        self.begun_with = done
        self.start = time.monotonic()
        self.last_line = self.start

    def update(self, done: int, quarantined: int) -> None:
        """Report that `done` rows are accounted for; prints at most every ten seconds."""
        now = time.monotonic()
        if now - self.last_line >= _SECONDS_BETWEEN_LINES:
            self.last_line = now
            print(self.line(done, quarantined, now - self.start), flush=True)

    def line(self, done: int, quarantined: int, seconds: float) -> str:
        """The line for `done` rows after `seconds`."""
        rate = (done - self.begun_with) / seconds if seconds > 0 else 0.0
        left = f", {_duration((self.planned - done) / rate)} left" if rate > 0 else ""
        share = done / self.planned
        return f"{done:,} of {self.planned:,} rows ({share:.1%}), {rate:,.0f} rows/s, {quarantined:,} quarantined{left}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
