"""`jobs/benchmark.py serve`: the service through HTTP, against a plain loop, static batching and the bare engine.

Every contestant answers the same questions, one photo each, with a model whose answers never end before `max_tokens`.
The loop and the bare engine get their prompts ready made; over HTTP, pictures travel as JPEG in base64. An application
of Ray Serve that answers at once shows what of the service's cost is Serve's own.
"""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import time
from collections.abc import Callable
from functools import partial
from itertools import cycle
from pathlib import Path
from random import Random
from statistics import median
from typing import Literal

import ray
import torch
from pydantic import PositiveInt, field_validator
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig
from transformers.utils.logging import disable_progress_bar

from flashsloth import FlashSlothImageProcessor, FlashSlothProcessor
from flashsloth.image_processing_flashsloth import decode_image
from pipelines.benchmarks.annotating import write_checkpoint
from pipelines.benchmarks.http_client import Connection, post_request
from pipelines.benchmarks.machine import describe_machine
from pipelines.benchmarks.photos import draw_corpus
from pipelines.benchmarks.plain_app import build_plain_app
from pipelines.benchmarks.rounds import Figures, take_turns, timed
from pipelines.benchmarks.serving_tables import AT, LENGTHS, MIXED, serving_bounds, serving_table
from pipelines.benchmarks.settings import BenchmarkSettings
from pipelines.benchmarks.sizes import MID, TINY
from pipelines.benchmarks.static_engine import build_static_app, generate
from pipelines.benchmarks.table import Report
from pipelines.ray_session import start_ray
from pipelines.serving.app import build_app
from pipelines.serving.engine import Encoder, Engine, EngineSettings, Prompt
from pipelines.serving.sampling import Sampling
from pipelines.serving.settings import ServeArgs
from pipelines.serving.transport import set_environment, wait_until_routed

_QUESTION = "What is in the picture?"
_QUIET = LoggingConfig(log_level="ERROR", enable_access_log=False)


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
        torch.set_num_threads(1)  # as in a replica with one CPU
        photos = sorted(corpus.rglob("*.jpg"))[: settings.photos]
        self.photos = [path.read_bytes() for path in photos]
        self.encoder = Encoder(processor)
        self.prompts = [self._prompt(photo) for photo in self.photos]
        # Without a cache of images: the others have none.
        budgets = EngineSettings(max_slots=AT, max_length=512, max_waiting=256, image_cache_bytes=0)
        self.engine = Engine.from_checkpoint(checkpoint, "cpu", "float32", budgets)
        args = ServeArgs(
            checkpoint=str(checkpoint),
            model_name="bench",
            device="cpu",
            num_cpus=0.5,  # both engines stay, and take turns
            ingress_num_cpus=0.25,
            engine=budgets,
        )
        self.address = _start(args)

    def contestants(self) -> dict[str, Callable[[], Figures]]:
        """Everything that is run once a round."""
        found: dict[str, Callable[[], Figures]] = {}
        for length in LENGTHS:
            found[f"loop, {length} tokens"] = partial(self.loop, length)
            found[f"engine, {length} tokens"] = partial(self.bare_engine, length)
            for clients in self.settings.concurrent:
                for name in ("service", "static"):
                    lengths = [length] * (clients * self.settings.requests_per_client)
                    found[f"{name}, {length} tokens, {clients}"] = partial(self.http, name, clients, lengths)
        source = Random(self.settings.seed)
        mixed = [source.randint(*MIXED) for _ in range(AT * self.settings.requests_per_client)]
        for name in ("service", "static"):
            found[f"{name}, mixed, {AT}"] = partial(self.http, name, AT, mixed)
        found["first token, engine"] = self.first_token_of_engine
        found["decoding"] = self.decoding
        found["first token, service"] = lambda: asyncio.run(self._first_tokens("service"))
        found["first token, Serve alone"] = lambda: asyncio.run(self._first_tokens("plain/stream"))
        ready = [LENGTHS[0]] * (AT * self.settings.requests_per_client)
        found["Serve alone"] = partial(self.http, "plain", AT, ready)
        return found

    def loop(self, length: int) -> Figures:
        """One `model.generate` after the other."""
        prompts = self._asked([length] * (4 if self.settings.quick else 12))
        seconds = timed(lambda: [generate(self.engine.model, self.engine.processor, [prompt]) for prompt in prompts])
        return {"requests_per_s": len(prompts) / seconds}

    def bare_engine(self, length: int) -> Figures:
        """As many requests at once as the bounds speak of, without anything around the engine."""
        prompts = self._asked([length] * (AT * self.settings.requests_per_client))
        return {"requests_per_s": len(prompts) / timed(lambda: self.engine.generate(prompts))}

    def http(self, name: str, clients: int, lengths: list[int]) -> Figures:
        """`clients` clients, each sending its share of the requests one after the other."""
        # Written before the clock starts: this process takes its time from the cores that the service needs.
        requests = [(self._request(name, index, length), length) for index, length in enumerate(lengths)]
        return {"requests_per_s": len(lengths) / timed(lambda: asyncio.run(self._ask_all(name, clients, requests)))}

    def first_token_of_engine(self) -> Figures:
        """From handing in a prompt to its first text, alone."""
        times = []
        for prompt in self._asked([LENGTHS[0]] * self._num_alone):
            start = time.perf_counter()
            chunks = self.engine.stream(prompt)
            next(chunk for chunk in chunks if chunk.text)
            times.append(time.perf_counter() - start)
            for _ in chunks:
                pass
        return {"first_token_ms": 1000 * median(times)}

    def decoding(self) -> Figures:
        """From a JPEG to a prompt, alone: over HTTP, a part of what is added to the first token."""
        times = [timed(partial(self._prompt, photo)) for photo in self.photos]
        return {"decoding_ms": 1000 * median(times)}

    def close(self) -> None:
        """Stop everything."""
        self.engine.close()
        ray.shutdown()

    @property
    def _num_alone(self) -> int:
        return 5 if self.settings.quick else 40

    def _asked(self, lengths: list[int]) -> list[Prompt]:
        pairs = zip(cycle(self.prompts), lengths, strict=False)
        return [
            Prompt(p.input_ids, p.question_ids, p.pixel_values, Sampling(max_tokens=length), p.image_key)
            for p, length in pairs
        ]

    def _prompt(self, photo: bytes) -> Prompt:
        return self.encoder.prompt([{"role": "user", "content": _QUESTION}], decode_image(photo))

    def _request(self, name: str, index: int, length: int, stream: bool = False) -> bytes:
        photo = base64.b64encode(self.photos[index % len(self.photos)]).decode()
        picture = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{photo}"}}
        content = [picture, {"type": "text", "text": _QUESTION}]
        messages = [{"role": "user", "content": content}]
        body = {"model": "bench", "messages": messages, "max_tokens": length, "stream": stream}
        return post_request(f"{self.address}/{name}/v1/chat/completions", json.dumps(body).encode())

    async def _ask_all(self, name: str, clients: int, requests: list[tuple[bytes, int]]) -> None:
        waiting = iter(requests)

        async def client() -> None:
            async with Connection.to(self.address) as connection:
                for request, length in waiting:
                    answer = await connection.ask(request)
                    if answer["usage"]["completion_tokens"] != length:
                        raise ValueError(f"{name}: asked for {length} tokens: {answer}")

        await asyncio.gather(*(client() for _ in range(clients)))

    async def _first_tokens(self, name: str) -> Figures:
        requests = [self._request(name, index, LENGTHS[0], stream=True) for index in range(self._num_alone)]
        times = []
        async with Connection.to(self.address) as connection:
            for request in requests:
                start = time.perf_counter()
                num_events = 0
                async for _ in connection.stream(request):
                    num_events += 1
                    if num_events == 2:  # who speaks, and the first text
                        times.append(time.perf_counter() - start)
        return {"first_token_ms": 1000 * median(times)}


def _start(args: ServeArgs) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    set_environment("127.0.0.1")  # as jobs/serve.py does
    start_ray(num_cpus=4)
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port), logging_config=_QUIET)
    serve.run(build_app(args), name="service", route_prefix="/service", logging_config=_QUIET)
    serve.run(build_static_app(args), name="static", route_prefix="/static", logging_config=_QUIET)
    serve.run(build_plain_app(args, LENGTHS[0]), name="plain", route_prefix="/plain", logging_config=_QUIET)
    for prefix in ("/service", "/static", "/plain"):
        wait_until_routed("127.0.0.1", port, prefix)
    return f"http://127.0.0.1:{port}"
