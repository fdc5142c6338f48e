"""What `jobs/benchmark.py serve` has measured, as a table and against its bounds."""

from __future__ import annotations

from statistics import median

from pipelines.benchmarks.rounds import Rounds
from pipelines.benchmarks.table import Bound, Table

LENGTHS = (16, 128)
"""Tokens of an answer."""
MIXED = (4, 128)
"""From, to, where they differ."""
AT = 16
"""Concurrent requests at which the bounds hold."""
_SOURCES = ("", " from JPEG")  # of what the loop and the bare engine are given: prompts ready made, or pictures


def serving_table(concurrent: tuple[int, ...], model: str, num_rounds: int, rounds: Rounds) -> Table:
    """Requests/s of the service beside its rivals."""
    rows = []
    for length in LENGTHS:
        loop = f"loop, {length} tokens"
        for clients in concurrent:
            service, static = (f"{name}, {length} tokens, {clients}" for name in ("service", "static"))
            rows.append([f"{clients} x {length}", *_row(rounds, service, static, loop)])
    mixed = _row(rounds, f"service, mixed, {AT}", f"static, mixed, {AT}", None)
    rows.append([f"{AT} x {MIXED[0]} to {MIXED[1]}", *mixed])
    firsts = (f"first token, {name}" for name in ("engine", "service", "engine from JPEG", "Serve alone"))
    first = [rounds.spread(name, "first_token_ms").median for name in firsts]
    ready = rounds.spread("Serve alone", "requests_per_s").median
    notes = [
        f"Concurrent requests x output tokens, one photo each; {model} model; requests/s, medians of "
        f"{num_rounds} rounds. First text alone: {first[0]:.1f} ms in the bare engine, {first[1]:.1f} ms over "
        f"HTTP, {first[2]:.1f} ms in an engine that is given the JPEG.",
        f"Ray Serve alone, with an engine that has every answer ready: {first[3]:.1f} ms to the first text, "
        f"{ready:.0f} requests/s at {AT}.",
    ]
    columns = ["requests", "service", "static batching", "of static", "of a loop"]
    return Table(title="Serving", columns=columns, rows=rows, notes=notes)


def _row(rounds: Rounds, service: str, static: str, loop: str | None) -> list[str]:
    figure = "requests_per_s"
    of_static = rounds.ratio(service, static, figure).median
    of_loop = "" if loop is None else f"{rounds.ratio(service, loop, figure).median:.2f}"
    speeds = [f"{rounds.spread(name, figure).median:.1f}" for name in (service, static)]
    return [*speeds, f"{of_static:.2f}", of_loop]


def serving_bounds(rounds: Rounds) -> list[Bound]:
    """What is wanted, and what came of it."""
    figure = "requests_per_s"
    bounds = []
    for length in LENGTHS:
        service = f"service, {length} tokens, {AT}"
        for source in _SOURCES:
            found = rounds.ratio(service, f"loop{source}, {length} tokens", figure).median
            bounds.append(_at_least(f"service at {AT} against a loop{source}, {length} tokens", 4, found))
            found = rounds.ratio(service, f"engine{source}, {length} tokens", figure).median
            bounds.append(_at_least(f"service at {AT} against the bare engine{source}, {length} tokens", 0.85, found))
    found = rounds.ratio(f"service, mixed, {AT}", f"static, mixed, {AT}", figure).median
    bounds.append(_at_least(f"service at {AT} against static batching, mixed lengths", 1.5, found))
    for source in _SOURCES:
        service, engine = "first token, service", f"first token, engine{source}"
        added = median(each[service]["first_token_ms"] - each[engine]["first_token_ms"] for each in rounds.figures)
        name = f"added to the first token of the bare engine{source}, ms"
        bounds.append(Bound(name=name, sense="at most", wanted=8, measured=added))
    return bounds


def _at_least(name: str, wanted: float, measured: float) -> Bound:
    return Bound(name=name, sense="at least", wanted=wanted, measured=measured)
