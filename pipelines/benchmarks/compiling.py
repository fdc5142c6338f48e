"""Where `model.compile` helps: our own step with compiled layers against the same step without."""

from __future__ import annotations

import time
from typing import Any

from pipelines.benchmarks.rounds import Rounds, take_turns
from pipelines.benchmarks.step import StepBench, Variant
from pipelines.benchmarks.table import Table

_EAGER, _COMPILED = "eager", "compiled"


def measure_compiling(bench: StepBench, rounds: int) -> tuple[Table, dict[str, Any]]:
    """Time both on rows with images and on text alone.

    Raises:
        ValueError: the losses of the two differ by more than 1e-4.
    """
    cells, measured = [], {}
    for kind in bench.batches:
        found, first_s = _measure(bench, kind, rounds)
        seconds = [f"{found.spread(name, 'seconds').median:.2f}" for name in (_EAGER, _COMPILED)]
        gain = found.ratio(_EAGER, _COMPILED, "seconds")
        cells.append([kind, *seconds, f"{gain.median:.2f} ({gain.low:.2f} to {gain.high:.2f})", f"{first_s:.0f}"])
        measured[f"compile, {kind}"] = found.record()
    table = Table(
        title="Layers compiled (`model.compile`)",
        columns=["rows", "eager, s", "compiled, s", "gain", "first step, s"],
        rows=cells,
        notes=["The first step compiles, unless torch has kept what it compiled before."],
    )
    return table, measured


def _measure(bench: StepBench, kind: str, rounds: int) -> tuple[Rounds, float]:
    """Both steps in turns, and the seconds of the first compiled one."""
    steps = {
        _EAGER: bench.stepper(Variant(), bench.batches[kind]),
        _COMPILED: bench.stepper(Variant(), bench.batches[kind], compiled=True),
    }
    eager = steps[_EAGER]()["loss"]
    start = time.perf_counter()
    compiled = steps[_COMPILED]()["loss"]
    first_s = time.perf_counter() - start
    if abs(eager - compiled) > 1e-4:
        raise ValueError(f"the losses on {kind} differ by more than 1e-4: eager {eager}, compiled {compiled}")
    return take_turns(steps, rounds, say=lambda line: print(f"{kind}: {line}", flush=True)), first_s
