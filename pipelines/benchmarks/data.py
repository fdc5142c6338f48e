"""`jobs/benchmark.py data`: how fast images become shards, and shards become rows."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from pipelines.benchmarks.machine import describe_machine, num_cores
from pipelines.benchmarks.photos import draw_corpus, write_rows
from pipelines.benchmarks.preparing import bare_loop, data_loader
from pipelines.benchmarks.rounds import Rounds, take_turns
from pipelines.benchmarks.settings import BenchmarkSettings
from pipelines.benchmarks.table import Report, Table

_QUICK_PHOTOS = 48


class DataBenchmark(BenchmarkSettings):
    """Preparing images to `pixels` against a bare loop and a PyTorch DataLoader."""

    photos: int = Field(default=2000, gt=0)
    """Made-up photos of about 500 x 400 pixels."""
    seed: int = 0
    """Of the made-up photos."""


def measure_data(settings: DataBenchmark) -> Report:
    """Run the whole benchmark."""
    machine = describe_machine()
    num_photos = _QUICK_PHOTOS if settings.quick else settings.photos
    corpus = draw_corpus(Path(settings.output) / "work", num_photos, settings.seed)
    rows = write_rows(corpus, num_photos, num_photos, settings.seed)
    rounds = take_turns(
        {
            "bare loop": lambda: bare_loop(corpus, rows),
            "DataLoader": lambda: data_loader(corpus, rows, num_cores()),
        },
        settings.rounds,
        say=lambda line: print(line, flush=True),
    )
    return Report(
        name="data",
        machine=machine,
        settings=settings.model_dump(),
        tables=[_preparing(rounds)],
        bounds=[],
        measured={"prepare": rounds.record()},
    )


def _preparing(rounds: Rounds) -> Table:
    names = list(rounds.figures[0])
    cells = [[name, f"{rounds.spread(name, 'rows_per_s').median:,.0f}"] for name in names]
    return Table(title="Images to pixels", columns=["contestant", "images/s"], rows=cells)
