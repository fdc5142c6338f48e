"""What the report of a training run is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Attempt:
    """The time between a start of the workers and their end."""

    started: float
    """Seconds since 1970."""
    step: int
    """It went on from here."""
    reached: int
    """An attempt before it had logged this step; what lies between is done again."""
    num_steps: int
    """Of the whole run."""
    world_size: int
    machines: Sequence[tuple[str, str]] = ()
    """Name and device of each worker's machine."""
    peak: Mapping[str, Any] = field(default_factory=dict)
    data: Sequence[str] = ()
    """Identities of the manifests."""
    environment: Mapping[str, str] = field(default_factory=dict)
    ended: float | None = None
    why: str = ""
    """How it ended."""
    is_failure: bool = False


@dataclass(frozen=True)
class History:
    """What happened to a run, from its events."""

    attempts: Sequence[Attempt] = ()
    state: str = "unknown"
    """running, finished, stopped or failed; unknown where no driver left a record."""
    message: str = ""
    """The last word of a job that failed or was stopped."""
    seconds: float = 0.0
    """While a job ran, over all of them."""
    last: float | None = None
    """Last sign of life, seconds since 1970."""
    saved: Sequence[int] = ()
    """Steps of completed checkpoints."""
    notes: Sequence[tuple[float, str, str]] = ()
    """Time, who, and what happened, in order."""

    @property
    def restarts(self) -> int:
        """Attempts after the first."""
        return max(0, len(self.attempts) - 1)


@dataclass(frozen=True)
class Window:
    """The steps between two lines of metrics."""

    first: int
    last: int
    """Both are done in it."""
    seconds: float
    figures: Mapping[str, float]
    world_size: int = 1
    starts_attempt: bool = False

    @property
    def steps(self) -> int:
        """How many."""
        return self.last - self.first + 1


@dataclass(frozen=True)
class Stall:
    """Steps that took far longer than others, or waited for data."""

    window: Window
    typical: float
    """Seconds of a typical step."""
    lost: float
    """Seconds more than as many typical steps take."""
    cause: str


@dataclass(frozen=True)
class TimeUse:
    """What a part of the running time went into."""

    name: str
    seconds: float
    share: float
    colour: str
    """CSS variable."""


@dataclass(frozen=True)
class Panel:
    """A figure of the metrics over the steps."""

    title: str
    note: str
    svg: str
    keys: Sequence[tuple[str, str]] = ()
    """Colour and name of each line, where there are several."""


@dataclass(frozen=True)
class Headline:
    """A number at the head of the page."""

    number: str
    name: str
    note: str = ""


@dataclass(frozen=True)
class RunReport:
    """Everything the page shows."""

    name: str
    run_uri: str
    history: History
    num_steps: int
    step: int
    """The last one logged."""
    headlines: Sequence[Headline]
    findings: Sequence[tuple[str, str, str]]
    """Subject, verdict (good, bad, plain) and sentence."""
    time_uses: Sequence[TimeUse]
    panels: Sequence[Panel]
    stalls: Sequence[Stall]
    throughput: Mapping[str, str]
    data: Mapping[str, Mapping[str, str]]
    settings: str
    environment: Mapping[str, str]
