"""`jobs/benchmark.py data`: how fast images become shards, and shards become rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Literal

import ray
from pydantic import Field

from pipelines import storage
from pipelines.benchmarks.data_tables import (
    growth_table,
    preparing_table,
    reading_table,
    share_of_cores_left,
    sharing_table,
)
from pipelines.benchmarks.growth import grown
from pipelines.benchmarks.image_sharing import measure_sharing
from pipelines.benchmarks.machine import describe_machine, num_cores
from pipelines.benchmarks.photos import draw_corpus, write_rows
from pipelines.benchmarks.preparing import (
    CheckedPhotos,
    LoaderContestant,
    Photos,
    PrepareContestant,
    bare_loop,
    remove,
    start_warm_ray,
    upload_photos,
)
from pipelines.benchmarks.reading import read_all, write_copies
from pipelines.benchmarks.rounds import Figures, Rounds, take_turns
from pipelines.benchmarks.settings import BenchmarkSettings
from pipelines.benchmarks.table import Bound, Report, Table

BARE, OWN, LOOPS = "bare loop", "bare loop of our functions", "bare loop on each core"
LOADER, WRITING = "DataLoader, nothing written", "DataLoader, batches written to disk"
FROM_S3 = "DataLoader from S3, nothing written"
LOCAL, S3, S3_TO_S3 = "prepare", "prepare to S3", "prepare from S3 to S3"
_FEW, _WARM, _SHARING = 4, 1000, 600  # rows
_REPEATS = 1.65  # rows to an image, as in mix665k

Part = Literal["prepare", "sharing", "growth", "read"]


class DataBenchmark(BenchmarkSettings):
    """Preparing images to `pixels` against a bare loop and a PyTorch DataLoader; shards against other formats."""

    parts: list[Part] = Field(default=["prepare", "sharing", "growth", "read"], min_length=1)
    """What to measure: all of it takes about a quarter of an hour on two cores."""
    photos: int = Field(default=2000, gt=0)
    """Made-up photos of about 500 x 400 pixels."""
    row_counts: list[int] = Field(default=[1000, 5000, 20000], min_length=2)
    """Rows that are prepared to see whether a row costs the same."""
    workers: list[int] = Field(default=[1, 2], min_length=1)
    """Numbers of processes that read."""
    s3: str | None = None
    """An s3:// folder to write to as well, and to read the photos from; what is in it is removed at the end.
    AWS_ENDPOINT_URL names a store other than AWS. A store on this machine takes its share of the cores: its own time is
    then in the figures."""
    seed: int = 0
    """Of the made-up photos, and of the order in which rows are read."""


def measure_data(settings: DataBenchmark) -> Report:
    """Run the whole benchmark, or the parts of it that are asked for."""
    if settings.quick:
        settings = settings.model_copy(update={"photos": 24, "row_counts": [24, 48], "rounds": 1})
    machine = describe_machine()
    bench = _Bench(settings)
    parts = {"prepare": bench.prepare, "sharing": bench.share_images, "growth": bench.grow, "read": bench.read}
    try:
        for part in settings.parts:
            parts[part]()
    finally:
        ray.shutdown()
        for place in bench.places.values():
            remove(place)
    return Report(
        name="data",
        machine=machine,
        settings=settings.model_dump(),
        tables=bench.tables,
        bounds=bench.bounds,
        measured=bench.measured,
    )


class _Bench:
    """The corpus, and what has been found so far."""

    def __init__(self, settings: DataBenchmark) -> None:
        self.settings = settings
        work = (Path(settings.output) / "work").resolve()
        self.places = {LOCAL: str(work / "out")} | ({S3: settings.s3} if settings.s3 else {})
        self.corpus = draw_corpus(work, settings.photos, settings.seed)
        self.rows = partial(write_rows, self.corpus, num_photos=settings.photos, seed=settings.seed)
        self.few, self.warm = self.rows(_FEW), self.rows(min(_WARM, settings.photos))
        self._uploaded = storage.join(settings.s3, "photos") if settings.s3 else ""
        self.tables: list[Table] = []
        self.bounds: list[Bound] = []
        self.measured: dict[str, object] = {}

    def prepare(self) -> None:
        """Images to pixels."""
        start_warm_ray()
        rows, cores = self.rows(self.settings.photos), num_cores()
        photos = Photos(self.corpus, rows)
        ours = self._preparations(rows)
        loops = LoaderContestant(photos, cores, hands_over=False)
        loader = LoaderContestant(photos, cores)
        writing = LoaderContestant(photos, cores, folder=Path(self._local("loader")))
        for contestant in ours.values():
            contestant.warm_up(self.warm)
        contestants: dict[str, Callable[[], Figures]] = {
            BARE: partial(bare_loop, photos),
            OWN: partial(bare_loop, CheckedPhotos(self.corpus, rows)),
        }
        contestants |= {LOOPS: loops, LOADER: loader, WRITING: writing, **ours}
        if self.settings.s3:
            uploaded = Photos(self.corpus, rows, self._uploaded)
            contestants[FROM_S3] = LoaderContestant(uploaded, cores)
        rounds = take_turns(contestants, self.settings.rounds, _say)
        again = {name: contestant.again() for name, contestant in ours.items()}
        writing.drop()
        for contestant in ours.values():
            contestant.drop()
        self.tables.append(preparing_table(rounds, cores, BARE, again))
        for name in ours:
            share = rounds.ratio(name, BARE, "rows_per_s").median / cores
            self._bound(f"{name}: share of {BARE} x {cores}", share, at_least=0.85)
            if name != LOCAL:
                share = share_of_cores_left(rounds, name, BARE, cores).median
                self._bound(f"{name}: share of {BARE} x cores that the store left", share, at_least=0.85)
            share = rounds.ratio(name, OWN, "rows_per_s").median / cores
            self._bound(f"{name}: share of {OWN} x {cores}", share, at_least=0.85)
            # What the cores of a machine do together, where they share caches or are threads of one core.
            share = rounds.ratio(name, LOOPS, "rows_per_s").median
            self._bound(f"{name}: share of {LOOPS}", share, at_least=0.85)
            for rival in (FROM_S3,) if name == S3_TO_S3 else (LOADER, WRITING):
                ratio = rounds.ratio(name, rival, "rows_per_s").median
                self._bound(f"{name}: rate by that of {rival}, with {cores} workers", ratio, at_least=1)
            self._bound(f"{name}: seconds of a second run", again[name], at_most=10)
        self.measured["prepare"] = rounds.record() | {"second_run_s": again}

    def _preparations(self, rows: Path) -> dict[str, PrepareContestant]:
        ours = {name: PrepareContestant(self.corpus, rows, self.few, place) for name, place in self.places.items()}
        if self.settings.s3:
            upload_photos(self.corpus, self._uploaded)
            output = storage.join(self.settings.s3, "from-s3")
            ours[S3_TO_S3] = PrepareContestant(self.corpus, rows, self.few, output, image_root=self._uploaded)
        return ours

    def grow(self) -> None:
        """More and more rows."""
        ray.shutdown()  # each size starts its own
        counts = self.settings.row_counts
        sizes = {
            f"{count:,}": partial(grown, self.corpus, self.rows(count), self.few, self._local("grown"), self.warm)
            for count in counts
        }
        rounds = take_turns(sizes, self.settings.rounds, partial(_say_of, "rows"))
        self.tables.append(growth_table(rounds))
        self._bound(f"time of a row, slowest of {counts} rows by fastest", _slowest_by_fastest(rounds), at_most=1.15)
        first, *_, last = sizes
        for who in ("driver", "worker"):
            growth = rounds.ratio(last, first, f"{who}_mib").median
            self._bound(f"peak memory of a {who}, {last} rows by {first}", growth, at_most=1.1)
        self.measured["growth"] = rounds.record()

    def share_images(self) -> None:
        """Images stored once, where they repeat and where they do not. No bound: it is off by default."""
        start_warm_ray()
        num_rows = min(_SHARING, self.settings.photos)
        found: dict[str, Rounds] = {}
        for repeats in (1.0, _REPEATS):
            rows = write_rows(self.corpus, num_rows, int(num_rows / repeats), self.settings.seed)
            output, rounds = self._local("sharing"), self.settings.rounds
            found[f"{repeats:g}"] = measure_sharing(self.corpus, rows, self.few, self.warm, output, rounds, _say)
        self.tables.append(sharing_table(num_rows, found))
        self.measured["sharing"] = {repeats: rounds.record() for repeats, rounds in found.items()}

    def read(self) -> None:
        """Shards against other formats, in every order and with every number of workers."""
        start_warm_ray()
        rows = self.rows(self.settings.photos)
        shards = {
            place: PrepareContestant(self.corpus, rows, self.few, place).leave() for place in self.places.values()
        }
        ray.shutdown()  # its processes would compete with those that read
        for place, prepared in shards.items():
            self._read(prepared, storage.join(place, "copies"))

    def _read(self, shards: str, folder: str) -> None:
        copies = write_copies(shards, folder)
        where = "a local disk" if copies.is_local else "S3"
        found: dict[str, Rounds] = {}
        for is_random in (False, True):
            for workers in self.settings.workers:
                title = f"{'random' if is_random else 'sequential'}, {workers} worker{'s' if workers > 1 else ''}"
                readers = {
                    name: partial(read_all, copies, name, is_random, workers, self.settings.seed)
                    for name in copies.contestants(is_random)
                }
                if copies.is_local:
                    for read in readers.values():
                        read()  # files that were read before: disks are not what is compared
                found[title] = take_turns(readers, self.settings.rounds, partial(_say_of, f"{where}, {title}"))
        self.tables.append(reading_table(where, found))
        for title, each in found.items():
            own, *others = each.figures[0]
            if others:
                ratio = min(each.ratio(own, other, "rows_per_s").median for other in others)
                self._bound(f"read from {where}, {title}: of the best rival's rows/s", ratio, at_least=1)
        self.measured[f"read from {where}"] = {title: each.record() for title, each in found.items()}

    def _local(self, name: str) -> str:
        return storage.join(self.places[LOCAL], name)

    def _bound(self, name: str, measured: float, at_least: float | None = None, at_most: float | None = None) -> None:
        if at_least is not None:
            self.bounds.append(Bound(name=name, sense="at least", wanted=at_least, measured=measured))
        if at_most is not None:
            self.bounds.append(Bound(name=name, sense="at most", wanted=at_most, measured=measured))


def _slowest_by_fastest(rounds: Rounds) -> float:
    """Of the two contestants that differ the most in the median of the rounds, the ratio. The slowest and the fastest
    of each round by itself would differ among equals: a machine's noise is no growth."""
    names = rounds.figures[0]
    return max(rounds.ratio(fast, slow, "rows_per_s").median for fast in names for slow in names)


def _say_of(what: str, line: str) -> None:
    _say(f"{what}: {line}")


def _say(line: str) -> None:
    print(line, flush=True)
