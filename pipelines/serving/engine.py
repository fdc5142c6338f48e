"""The engine: prompts in, answers out, many at a time. Plain Python and torch, usable without Ray.

    with Engine.from_checkpoint(checkpoint) as engine:
        prompt = Encoder(engine.processor).prompt([{"role": "user", "content": "What color is it?"}], image)
        for chunk in engine.stream(prompt):
            print(chunk.text, end="", flush=True)

A thread moves all requests on together, step by step (see `batch.py`): a request joins when a slot is free, and leaves
with its last token. What it gets does not depend on who else is there: greedy rows equal one-by-one `model.generate`,
sampled rows draw from their own seed.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from pipelines.serving.answers import Answer, Chunk, FinishReason
from pipelines.serving.batch import ContinuousBatch, EngineFull, EngineStats
from pipelines.serving.checkpoint import load_model, load_processor
from pipelines.serving.engine_settings import EngineSettings
from pipelines.serving.prompts import Encoder, Prompt
from pipelines.serving.tickets import Ticket

__all__ = [
    "Answer",
    "Chunk",
    "Encoder",
    "Engine",
    "EngineFull",
    "EngineSettings",
    "EngineStats",
    "EngineStuck",
    "FinishReason",
    "Prompt",
    "Ticket",
]

logger = logging.getLogger(__name__)


class EngineStuck(RuntimeError):
    """The engine's thread will not move any request on, and nothing can make it: only a new process helps."""


class Engine:
    """A model that answers prompts. Every method may be called from any thread, by many at once.

    Raises:
        ValueError: the settings leave no room for a single slot.
    """

    def __init__(
        self,
        model: FlashSlothForConditionalGeneration,
        processor: FlashSlothProcessor,
        settings: EngineSettings | None = None,
    ) -> None:
        self.model = model.eval()
        self.processor = processor
        self.settings = settings or EngineSettings()
        self._batch = ContinuousBatch(self.model, processor, self.settings)
        self._closed = False
        self._changed = threading.Condition()  # a request came, a step is over, or the engine is closed
        self._thread = threading.Thread(target=self._run, name="flashsloth-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: str | Path,
        device: str = "auto",
        dtype: str = "auto",
        settings: EngineSettings | None = None,
    ) -> Engine:
        """Load an exported checkpoint; raises `CheckpointError` where the folder holds none that can be served."""
        model = load_model(checkpoint, device, dtype)
        return cls(model, load_processor(checkpoint), settings)

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *exception: Any) -> None:
        self.close()

    @property
    def max_length(self) -> int:
        """The most tokens of a prompt and its answer together."""
        return self._batch.slots.length

    def submit(self, prompt: Prompt) -> Ticket:
        """Hand in a prompt without waiting; the answer comes through the ticket.

        Raises:
            TypeError: it is no `Prompt`.
            ValueError: the prompt can never be answered: its parts do not match, or it fits into no slot.
            EngineFull: as many requests wait as may wait.
            RuntimeError: the engine is closed.
        """
        with self._changed:
            self._check_open()
            ticket = self._batch.submit(prompt)
            self._changed.notify_all()
        return ticket

    def stream(self, request: Prompt | Ticket) -> Iterator[Chunk]:
        """The answer, chunk by chunk as it comes. Whoever stops listening cancels the request.

        Raises:
            As `submit`, where a prompt is given.
            RuntimeError: somebody listens to the ticket already.
        """
        ticket = request if isinstance(request, Ticket) else self.submit(request)
        chunks: queue.SimpleQueue[Chunk] = queue.SimpleQueue()
        ticket.set_listener(chunks.put)
        stream = _until_the_last(ticket, chunks)
        next(stream)  # its opening: a generator that has not begun would not notice that it is dropped
        return stream

    def generate(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Answer all prompts, in their order; however many there are, they wait for their place in the queue.

        Raises:
            TypeError, ValueError: one of the prompts is none, or can never be answered; none is then begun.
            Exception: what made one of the requests fail, once all have ended.
        """
        for prompt in prompts:
            self._batch.check(prompt)
        tickets: list[Ticket] = []
        try:
            tickets.extend(self._submit_in_turn(prompt) for prompt in prompts)
            collectors = [_Collector(ticket) for ticket in tickets]
            answers = [collector.wait() for collector in collectors]
        finally:
            for ticket in tickets:
                ticket.cancel()
        for index, ticket in enumerate(tickets):
            if ticket.failure is not None:
                ticket.failure.add_note(f"prompt {index} of {len(tickets)}")
                raise ticket.failure
        return answers

    def stats(self) -> EngineStats:
        """What the engine does, and has done since its start."""
        return self._batch.stats()

    @torch.inference_mode()
    def check(self, patience_s: float = 60.0) -> None:
        """Raise `RuntimeError` where the model gives no answers any more.

        While requests run, the last step must not lie longer back than `patience_s`: that is an `EngineStuck`.
        Otherwise one token is run.
        """
        self._check_open()
        if not self._thread.is_alive():
            raise EngineStuck("the engine's thread has ended")
        if self._batch.busy:
            idle = time.monotonic() - self._batch.last_step_at
            if idle > patience_s:
                raise EngineStuck(f"no decode step in {idle:.0f} s, at most {patience_s:.0f} are allowed")
            return
        token = torch.tensor([[self.processor.eos_token_id]], device=self.model.device)
        if not bool(self.model(input_ids=token).logits.isfinite().all()):
            raise RuntimeError("the model gives logits that are not finite")

    def close(self) -> None:
        """Stop the thread. Requests that have not ended fail."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the engine is closed")

    def _submit_in_turn(self, prompt: Prompt) -> Ticket:
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._batch.has_room())
            return self.submit(prompt)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._closed or self._batch.busy)
                if self._closed:
                    break
            try:
                self._batch.step()
            except Exception as failure:
                logger.exception("a step failed, and with it every request of the engine")
                self._batch.fail_all(failure)
        self._batch.fail_all(RuntimeError("the engine is closed"))


class _Collector:
    """Gathers an answer without waking anybody before its end."""

    def __init__(self, ticket: Ticket) -> None:
        self._chunks: list[Chunk] = []
        self._ended = threading.Event()
        ticket.set_listener(self._add)

    def wait(self) -> Answer:
        self._ended.wait()
        return Answer.join(self._chunks)

    def _add(self, chunk: Chunk) -> None:
        self._chunks.append(chunk)
        if chunk.finish_reason is not None:
            self._ended.set()


def _until_the_last(ticket: Ticket, chunks: queue.SimpleQueue[Chunk]) -> Iterator[Chunk]:
    """An opening without content, then the chunks. Cancels the request where it is dropped in between."""
    try:
        yield Chunk([], "")
        while True:
            chunk = chunks.get()
            yield chunk
            if chunk.finish_reason is not None:
                return
    finally:
        ticket.cancel()
