"""The contestants of `jobs/benchmark.py serve` that know nothing of HTTP: a loop, and the engine as a script has it.

Each is given its prompts ready made, or the JPEG that the service has to decode as well.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median

import torch

from flashsloth import FlashSlothProcessor
from flashsloth.image_processing_flashsloth import decode_image
from pipelines.benchmarks.rounds import Figures, timed
from pipelines.benchmarks.static_engine import generate
from pipelines.serving.engine import Encoder, Engine, EngineSettings, Prompt
from pipelines.serving.sampling import Sampling

QUESTION = "What is in the picture?"

MakePrompt = Callable[[], Prompt]


class LocalContestants:
    """The model in this process.

    Args:
        checkpoint: the exported model.
        processor: makes the prompts.
        budgets: of the engine.
        photos: JPEG files, asked about in turn.
    """

    def __init__(
        self, checkpoint: Path, processor: FlashSlothProcessor, budgets: EngineSettings, photos: list[bytes]
    ) -> None:
        torch.set_num_threads(1)  # as in a replica with one CPU
        self.engine = Engine.from_checkpoint(checkpoint, "cpu", "float32", budgets)
        self._encoder = Encoder(processor)
        self._photos = photos
        self._prompts = [self._prompt(photo, 1) for photo in photos]

    def loop(self, num_prompts: int, length: int, from_jpeg: bool = False) -> Figures:
        """One `model.generate` after the other."""

        made = list(self._made(num_prompts, length, from_jpeg))

        def answer() -> None:
            for make in made:
                generate(self.engine.model, self.engine.processor, [make()])

        return {"requests_per_s": num_prompts / timed(answer)}

    def bare_engine(self, num_prompts: int, length: int, from_jpeg: bool = False) -> Figures:
        """All at once. From JPEG, this thread makes prompts while the engine's answers those that are made."""
        made = list(self._made(num_prompts, length, from_jpeg))

        def answer() -> None:
            tickets = [self.engine.submit(make()) for make in made]
            for ticket in tickets:
                for _ in self.engine.stream(ticket):
                    pass

        ready = [] if from_jpeg else [make() for make in made]
        seconds = timed(answer) if from_jpeg else timed(lambda: self.engine.generate(ready))
        return {"requests_per_s": num_prompts / seconds}

    def first_token(self, num_prompts: int, length: int, from_jpeg: bool = False) -> Figures:
        """From a prompt, or a JPEG, to the first text of the engine, alone."""
        times = []
        for make in self._made(num_prompts, length, from_jpeg):
            start = time.perf_counter()
            chunks = self.engine.stream(make())
            next(chunk for chunk in chunks if chunk.text)
            times.append(time.perf_counter() - start)
            for _ in chunks:
                pass
        return {"first_token_ms": 1000 * median(times)}

    def close(self) -> None:
        """Stop the engine."""
        self.engine.close()

    def _made(self, num_prompts: int, length: int, from_jpeg: bool) -> Iterator[MakePrompt]:
        for _, photo, ready in zip(range(num_prompts), cycle(self._photos), cycle(self._prompts), strict=False):
            if from_jpeg:
                yield partial(self._prompt, photo, length)
            else:
                yield partial(replace, ready, sampling=Sampling(max_tokens=length))

    def _prompt(self, photo: bytes, length: int) -> Prompt:
        messages = [{"role": "user", "content": QUESTION}]
        return self._encoder.prompt(messages, decode_image(photo), Sampling(max_tokens=length))
