"""`jobs/benchmark.py train`: a training step against the published forward, the feed against the step, Ray Train and
DeepSpeed against a bare loop, and padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import Field, PositiveInt

from pipelines.benchmarks.compiling import measure_compiling
from pipelines.benchmarks.feeding import feed_alone, measure_padding
from pipelines.benchmarks.full_size import measure_full_size
from pipelines.benchmarks.machine import describe_machine
from pipelines.benchmarks.overhead import measure_overhead
from pipelines.benchmarks.rounds import Figures
from pipelines.benchmarks.settings import BenchmarkSettings
from pipelines.benchmarks.step import StepBench, compare_steps
from pipelines.benchmarks.table import Bound, Report, Table
from pipelines.feed import PreparedRows

Part = Literal["step", "overhead", "padding", "compile", "full_size"]
Found = tuple[list[Table], list[Bound], dict[str, Any]]
"""What a part has found: tables, bounds, and every single run."""


class TrainBenchmark(BenchmarkSettings):
    """What training is claimed to do, on the CPU at a mid-size configuration."""

    parts: list[Part] = Field(default=["step", "overhead", "padding"], min_length=1)
    """What to measure; `step` includes the feed. These take a quarter of an hour on two cores.
    `compile` measures compiled layers, `full_size` the recipes with 3.2B parameters on a GPU."""
    micro_size: PositiveInt = 8
    """Rows that the published step puts through the model at once; our step gets the same rows."""
    feed_rows: PositiveInt = 512
    """Rows of the folder that the feed reads, 0.4 MB each."""
    padding_rows: PositiveInt = 50_000
    """Drawn lengths for the shares of padding."""
    seed: int = 0
    """Of lengths, words, pixels and weights."""
    waiting_steps: PositiveInt = 6
    """Steps over which the waiting share is taken."""


def measure_train(settings: TrainBenchmark) -> Report:
    """Run the whole benchmark, or the parts of it that are asked for."""
    if settings.quick:
        settings = settings.model_copy(
            update={"micro_size": 2, "feed_rows": 64, "padding_rows": 2000, "rounds": 1, "waiting_steps": 1}
        )
    machine, work = describe_machine(), Path(settings.output) / "work"
    measure = {
        "step": _measure_step,
        "overhead": _measure_overhead,
        "padding": _measure_padding,
        "compile": _measure_compiling,
        "full_size": _measure_full_size,
    }
    tables: list[Table] = []
    bounds: list[Bound] = []
    measured: dict[str, Any] = {}
    for part in settings.parts:
        found = measure[part](settings, work)
        tables, bounds, measured = tables + found[0], bounds + found[1], measured | found[2]
    return Report(
        name="train", machine=machine, settings=settings.model_dump(), tables=tables, bounds=bounds, measured=measured
    )


def _measure_step(settings: TrainBenchmark, work: Path) -> Found:
    bench = StepBench(work, settings.feed_rows, settings.micro_size, settings.seed)
    rounds = {kind: bench.measure(kind, settings.rounds) for kind in bench.batches}
    step_table, step_bound, ours_per_s = compare_steps(bench, rounds)
    feed_table, feed_bounds, feed = _feed(settings, bench, ours_per_s)
    measured = {kind: each.record() for kind, each in rounds.items()} | {"feed": feed}
    return [step_table, feed_table], [step_bound, *feed_bounds], measured


def _measure_overhead(settings: TrainBenchmark, work: Path) -> Found:
    table, bounds, measured = measure_overhead(
        work, settings.feed_rows, settings.micro_size, settings.rounds, settings.seed
    )
    return [table], bounds, {"overhead": measured}


def _measure_padding(settings: TrainBenchmark, work: Path) -> Found:
    table, bounds, measured = measure_padding(settings.padding_rows, settings.seed)
    return [table], bounds, {"padding": measured}


def _measure_compiling(settings: TrainBenchmark, work: Path) -> Found:
    bench = StepBench(work, settings.feed_rows, settings.micro_size, settings.seed)
    table, measured = measure_compiling(bench, settings.rounds)
    return [table], [], measured


def _measure_full_size(settings: TrainBenchmark, work: Path) -> Found:
    return measure_full_size(work, settings.seed, settings.quick)


def _feed(settings: TrainBenchmark, bench: StepBench, ours_per_s: float) -> tuple[Table, list[Bound], list[Figures]]:
    runs = []
    for _ in range(settings.rounds):
        rows = PreparedRows([dataset.folder for dataset in bench.rows.datasets])
        runs.append(feed_alone(rows, bench.processor, 64, settings.micro_size, threads=1))
    rate = float(np.median([run["rows_per_s"] for run in runs]))
    waiting = bench.waiting_share(settings.waiting_steps)
    table = Table(
        title="Feed alone (local disk, pixels, one reader thread, hashes verified)",
        columns=["what", "figure"],
        rows=[
            ["feed, samples/s", f"{rate:,.0f}"],
            ["step, samples/s", f"{ours_per_s:.2f}"],
            ["feed / step", f"{rate / ours_per_s:,.0f}x"],
            ["share of the step spent waiting", f"{waiting:.2%}"],
        ],
    )
    bounds = [
        Bound(name="feed alone against the step", sense="at least", wanted=20, measured=rate / ours_per_s),
        Bound(name="share of the step spent waiting", sense="at most", wanted=0.02, measured=waiting),
    ]
    return table, bounds, runs
