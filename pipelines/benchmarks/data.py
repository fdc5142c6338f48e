"""`jobs/benchmark.py data`: how fast images become shards, and shards become rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray
from pydantic import Field

from pipelines import storage
from pipelines.benchmarks.data_tables import growth_table, preparing_table, reading_table
from pipelines.benchmarks.growth import grown
from pipelines.benchmarks.machine import describe_machine, num_cores
from pipelines.benchmarks.photos import draw_corpus, write_rows
from pipelines.benchmarks.preparing import LoaderContestant, Photos, PrepareContestant, bare_loop, remove
from pipelines.benchmarks.reading import read_all, write_copies
from pipelines.benchmarks.rounds import Figures, Rounds, take_turns
from pipelines.benchmarks.settings import BenchmarkSettings
from pipelines.benchmarks.table import Bound, Report, Table
from pipelines.ray_session import start_ray

BARE, LOADER, LOCAL, S3 = "bare loop", "DataLoader", "prepare", "prepare to S3"
_FEW = 4


class DataBenchmark(BenchmarkSettings):
    """Preparing images to `pixels` against a bare loop and a PyTorch DataLoader; shards against other formats."""

    photos: int = Field(default=2000, gt=0)
    """Made-up photos of about 500 x 400 pixels."""
    row_counts: list[int] = Field(default=[1000, 5000, 20000], min_length=2)
    """Rows that are prepared to see whether a row costs the same."""
    workers: list[int] = Field(default=[1, 2], min_length=1)
    """Numbers of processes that read."""
    s3: str | None = None
    """An s3:// folder to write to as well; what is in it is removed at the end. AWS_ENDPOINT_URL names a store other
    than AWS. A store on this machine takes its share of the cores: its own time is then in the figures."""
    seed: int = 0
    """Of the made-up photos, and of the order in which rows are read."""


@dataclass(frozen=True)
class _Corpus:
    folder: Path
    rows: Path
    few: Path
    warm: Path


def measure_data(settings: DataBenchmark) -> Report:
    """Run the whole benchmark."""
    if settings.quick:
        settings = settings.model_copy(update={"photos": 24, "row_counts": [24, 48], "rounds": 1})
    machine = describe_machine()
    work = (Path(settings.output) / "work").resolve()
    folder = draw_corpus(work, settings.photos, settings.seed)
    rows = partial(write_rows, folder, num_photos=settings.photos, seed=settings.seed)
    corpus = _Corpus(folder, rows(settings.photos), rows(_FEW), rows(min(500, settings.photos)))
    tables: list[Table] = []
    bounds: list[Bound] = []
    measured: dict[str, object] = {}
    try:
        prepared = _prepare(settings, corpus, work, tables, bounds, measured)
        _grow(settings, corpus, rows, work, tables, bounds, measured)
        for place, shards in prepared.items():
            _read(settings, place, shards, work, tables, bounds, measured)
    finally:
        ray.shutdown()
        for place in (str(work / "out"), *([settings.s3] if settings.s3 else [])):
            remove(place)
    return Report(
        name="data",
        machine=machine,
        settings=settings.model_dump(),
        tables=tables,
        bounds=bounds,
        measured=measured,
    )


def _prepare(
    settings: DataBenchmark,
    corpus: _Corpus,
    work: Path,
    tables: list[Table],
    bounds: list[Bound],
    measured: dict[str, object],
) -> dict[str, str]:
    """Images to pixels; returns where the last prepared datasets lie, by place."""
    start_ray()
    photos, cores = Photos(corpus.folder, corpus.rows), num_cores()
    places = {LOCAL: str(work / "out")} | ({S3: settings.s3} if settings.s3 else {})
    ours = {name: PrepareContestant(corpus.folder, corpus.rows, corpus.few, place) for name, place in places.items()}
    loader = LoaderContestant(photos, cores)
    for contestant in ours.values():
        contestant.warm_up(corpus.warm)
    rounds = take_turns({BARE: lambda: bare_loop(photos), LOADER: loader, **ours}, settings.rounds, _say)
    again = {name: contestant.again() for name, contestant in ours.items()}
    ray.shutdown()  # its processes would compete with what comes next
    tables.append(preparing_table(rounds, cores, BARE, again))
    for name in ours:
        share = rounds.ratio(name, BARE, "rows_per_s").median / cores
        bounds.append(Bound(name=f"{name}: share of {BARE} x {cores}", sense="at least", wanted=0.85, measured=share))
        ratio = rounds.ratio(name, LOADER, "rows_per_s").median
        bounds.append(
            Bound(name=f"{name}: of {LOADER} with {cores} workers", sense="at least", wanted=1, measured=ratio)
        )
        bounds.append(Bound(name=f"{name}: seconds of a second run", sense="at most", wanted=10, measured=again[name]))
    measured["prepare"] = rounds.record() | {"second_run_s": again}
    return {name: contestant.settings(corpus.rows).output for name, contestant in ours.items()}


def _grow(
    settings: DataBenchmark,
    corpus: _Corpus,
    rows: Callable[[int], Path],
    work: Path,
    tables: list[Table],
    bounds: list[Bound],
    measured: dict[str, object],
) -> None:
    """More and more rows."""
    found: dict[int, Figures] = {}
    for count in settings.row_counts:
        found[count] = grown(corpus.folder, rows(count), corpus.few, str(work / "out" / "grown"), corpus.warm)
        _say(f"{count:,} rows: {1000 * found[count]['seconds'] / count:.3f} ms a row, {found[count]}")
    tables.append(growth_table(found))
    times = [1 / figures["rows_per_s"] for figures in found.values()]
    name = f"time of a row, slowest of {settings.row_counts} rows by fastest"
    bounds.append(Bound(name=name, sense="at most", wanted=1.15, measured=max(times) / min(times)))
    first, last = (found[count] for count in (settings.row_counts[0], settings.row_counts[-1]))
    for who in ("driver", "worker"):
        growth = last[f"{who}_mib"] / first[f"{who}_mib"]
        name = f"peak memory of a {who}, {settings.row_counts[-1]:,} rows by {settings.row_counts[0]:,}"
        bounds.append(Bound(name=name, sense="at most", wanted=1.1, measured=growth))
    measured["growth"] = found


def _read(
    settings: DataBenchmark,
    place: str,
    shards: str,
    work: Path,
    tables: list[Table],
    bounds: list[Bound],
    measured: dict[str, object],
) -> None:
    """Shards against other formats, in every order and with every number of workers."""
    copies = write_copies(shards, storage.join(str(work / "out") if place == LOCAL else str(settings.s3), "copies"))
    found: dict[str, Rounds] = {}
    for is_random in (False, True):
        names = copies.contestants if not is_random else copies.contestants[: 2 if copies.mds else 1]
        for workers in settings.workers:
            title = f"{'random' if is_random else 'sequential'}, {workers} worker{'s' if workers > 1 else ''}"
            readers = {name: partial(read_all, copies, name, is_random, workers, settings.seed) for name in names}
            if copies.is_local:
                for read in readers.values():
                    read()  # files that were read before: disks are not what is compared
            found[title] = take_turns(readers, settings.rounds if copies.is_local else 1, _say)
    tables.append(reading_table("a local disk" if copies.is_local else "S3", found))
    for title, rounds in found.items():
        own, *others = rounds.figures[0]
        if others:
            ratio = min(rounds.ratio(own, other, "rows_per_s").median for other in others)
            name = f"read from {'disk' if copies.is_local else 'S3'}, {title}: of the better rival's rows/s"
            bounds.append(Bound(name=name, sense="at least", wanted=1, measured=ratio))
    measured[f"read, {'local' if copies.is_local else 'S3'}"] = {title: each.record() for title, each in found.items()}


def _say(line: str) -> None:
    print(line, flush=True)
