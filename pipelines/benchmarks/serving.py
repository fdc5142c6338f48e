"""`jobs/benchmark.py serve`: the service through HTTP, against a plain loop, static batching and the bare engine.

Every contestant answers the same questions, one photo each, with a model whose answers never end before `max_tokens`.
Over HTTP, pictures travel as JPEG in base64. The loop and the bare engine run twice: with their prompts ready made, and
making each of its JPEG, which is no cost of the service's own. An application of Ray Serve that answers at once shows
what is Serve's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random
from typing import Literal

from pydantic import PositiveInt, field_validator
from transformers.utils.logging import disable_progress_bar

from flashsloth import FlashSlothImageProcessor, FlashSlothProcessor
from pipelines.benchmarks.annotating import write_checkpoint
from pipelines.benchmarks.machine import describe_machine
from pipelines.benchmarks.photos import draw_corpus
from pipelines.benchmarks.rounds import Figures, take_turns
from pipelines.benchmarks.serving_http import PLAIN, PLAIN_STREAM, SERVICE, STATIC, Applications
from pipelines.benchmarks.serving_local import LocalContestants
from pipelines.benchmarks.serving_tables import AT, LENGTHS, MIXED, serving_bounds, serving_table
from pipelines.benchmarks.settings import BenchmarkSettings
from pipelines.benchmarks.sizes import MID, TINY
from pipelines.benchmarks.table import Report
from pipelines.serving.engine import EngineSettings
from pipelines.serving.settings import ServeArgs


class ServeBenchmark(BenchmarkSettings):
    """The service on the CPU, one engine on one thread."""

    photos: PositiveInt = 64
    """Made-up photos of about 500 x 400 pixels, asked about in turn."""
    concurrent: tuple[PositiveInt, ...] = (1, 4, 16, 64)
    """Requests at the same time."""
    requests_per_client: PositiveInt = 4
    """How many requests each of them sends, one after the other."""
    model: Literal["tiny", "mid"] = "tiny"
    """The quickstart's, answering in less time than the HTTP around it takes, or ten times as large at 384 pixels."""
    seed: int = 0
    """Of photos, weights and mixed lengths."""

    @field_validator("concurrent")
    @classmethod
    def _with_the_one_of_the_bounds(cls, concurrent: tuple[int, ...]) -> tuple[int, ...]:
        if AT not in concurrent:
            raise ValueError(f"{list(concurrent)} lacks {AT}, which the bounds speak of: add it")
        return concurrent


def measure_serve(settings: ServeBenchmark) -> Report:
    """Run the whole benchmark."""
    if settings.quick:
        settings = settings.model_copy(
            update={"photos": 8, "rounds": 1, "concurrent": (1, 16), "requests_per_client": 1}
        )
    machine = describe_machine()
    bench = _Bench(settings)
    try:
        rounds = take_turns(bench.contestants(), settings.rounds, say=lambda line: print(line, flush=True))
    finally:
        bench.close()
    return Report(
        name="serve",
        machine=machine,
        settings=settings.model_dump(),
        tables=[serving_table(settings.concurrent, settings.model, settings.rounds, rounds)],
        bounds=serving_bounds(rounds),
        measured={"serve": rounds.record()},
    )


class _Bench:
    """Three running applications on one Ray, and the same model in this process."""

    def __init__(self, settings: ServeBenchmark) -> None:
        self.settings = settings
        corpus = draw_corpus(Path(settings.output) / "work", settings.photos, settings.seed)
        tokenizer = FlashSlothProcessor.from_pretrained(corpus / "processor").tokenizer
        size = {"tiny": TINY, "mid": MID}[settings.model]
        images = FlashSlothImageProcessor(size=size.image_size)
        processor = FlashSlothProcessor(images, tokenizer, num_image_tokens=size.num_image_tokens)
        disable_progress_bar()
        checkpoint = corpus / settings.model
        write_checkpoint(checkpoint, processor, settings.seed, size)
        photos = [path.read_bytes() for path in sorted(corpus.rglob("*.jpg"))[: settings.photos]]
        # Without a cache of images: the others have none.
        most = max(256, AT * settings.requests_per_client)
        budgets = EngineSettings(max_slots=AT, max_length=512, max_waiting=most, image_cache_bytes=0)
        self._local = LocalContestants(checkpoint, processor, budgets, photos)
        args = ServeArgs(
            checkpoint=str(checkpoint),
            model_name="bench",
            device="cpu",
            num_cpus=0.5,  # both engines stay, and take turns
            ingress_num_cpus=0.25,
            engine=budgets,
        )
        self._apps = Applications(args, LENGTHS[0], photos)

    def contestants(self) -> dict[str, Callable[[], Figures]]:
        """Everything that is run once a round."""
        found: dict[str, Callable[[], Figures]] = {}
        each = self.settings.requests_per_client
        in_loop, alone = (4, 5) if self.settings.quick else (12, 40)
        for length in LENGTHS:
            for source, from_jpeg in (("", False), (" from JPEG", True)):
                found[f"loop{source}, {length} tokens"] = partial(self._local.loop, in_loop, length, from_jpeg)
                found[f"engine{source}, {length} tokens"] = partial(
                    self._local.bare_engine, AT * each, length, from_jpeg
                )
            for clients in self.settings.concurrent:
                for name in (SERVICE, STATIC):
                    lengths = [length] * (clients * each)
                    found[f"{name}, {length} tokens, {clients}"] = self._asked(name, clients, lengths)
        draw = Random(self.settings.seed)
        mixed = [draw.randint(*MIXED) for _ in range(AT * each)]
        for name in (SERVICE, STATIC):
            found[f"{name}, mixed, {AT}"] = self._asked(name, AT, mixed)
        first = LENGTHS[0]
        found["first token, engine"] = partial(self._local.first_token, alone, first)
        found["first token, engine from JPEG"] = partial(self._local.first_token, alone, first, True)
        found["first token, service"] = partial(self._apps.first_token, SERVICE, alone, first)
        found["first token, Serve alone"] = partial(self._apps.first_token, PLAIN_STREAM, alone, first)
        found["Serve alone"] = self._asked(PLAIN, AT, [first] * (AT * each))
        return found

    def close(self) -> None:
        """Stop everything."""
        self._local.close()
        self._apps.close()

    def _asked(self, name: str, clients: int, lengths: list[int]) -> Callable[[], Figures]:
        return partial(self._apps.requests_per_s, name, clients, lengths)
