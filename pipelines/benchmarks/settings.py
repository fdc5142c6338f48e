"""What the settings of every benchmark have in common."""

from __future__ import annotations

from pydantic import Field

from pipelines.settings import JobSettings


class BenchmarkSettings(JobSettings):
    """The settings of one benchmark. Subclass it."""

    output: str = "outputs/benchmarks"
    """Local folder for the JSON file with every run."""
    rounds: int = Field(default=3, gt=0)
    """How often every contestant runs, in turns; the medians are printed."""
    quick: bool = False
    """Small enough to see whether it runs. Its figures mean nothing."""
