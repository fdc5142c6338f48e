"""Contestants that take turns, so that their ratio holds on a machine whose speed drifts.

A time taken alone says more about what else the machine was doing than about the code. So every contestant runs once
in each round, the order turns round from one round to the next, and what counts is the ratio within a round: its
median over the rounds, with the lowest and the highest beside it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

Figures = Mapping[str, float]
"""What one run of a contestant has measured: `seconds`, `rows_per_s`, ..."""


@dataclass(frozen=True)
class Spread:
    """A figure over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """The spread of one value per round."""
        return cls(median(values), min(values), max(values))


@dataclass(frozen=True)
class Rounds:
    """What every contestant measured in every round."""

    figures: list[dict[str, Figures]]
    """Per round: contestant -> its figures."""
    loads: list[float]
    """Load average of the last minute at the end of each round: how busy the machine was, the benchmark included."""

    def spread(self, contestant: str, figure: str) -> Spread:
        """One figure of one contestant."""
        return Spread.of([each[contestant][figure] for each in self.figures])

    def ratio(self, contestant: str, other: str, figure: str) -> Spread:
        """A figure of `contestant` as a multiple of the same figure of `other`, round by round."""
        return Spread.of([each[contestant][figure] / each[other][figure] for each in self.figures])

    def record(self) -> dict[str, object]:
        """All of it, for a JSON file."""
        return {"rounds": [{name: dict(found) for name, found in each.items()} for each in self.figures]} | {
            "load_average": self.loads
        }


def take_turns(
    contestants: Mapping[str, Callable[[], Figures]], rounds: int, say: Callable[[str], None] | None = None
) -> Rounds:
    """Run every contestant `rounds` times, in turns. Warm up before: here every run counts.

    Args:
        contestants: name -> what runs once and returns its figures; the same names in every call.
        rounds: at least 1.
        say: is told what each run measured, as it happens.
    """
    figures: list[dict[str, Figures]] = []
    loads: list[float] = []
    for number in range(rounds):
        names = list(contestants)[:: 1 if number % 2 == 0 else -1]
        found: dict[str, Figures] = {}
        for name in names:
            found[name] = contestants[name]()
            if say:
                shown = ", ".join(f"{figure} {value:,.4g}" for figure, value in found[name].items())
                say(f"round {number + 1} of {rounds}: {name}: {shown}")
        figures.append({name: found[name] for name in contestants})
        loads.append(os.getloadavg()[0])
    return Rounds(figures, loads)


def timed(work: Callable[[], object]) -> float:
    """Seconds of wall clock that `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
