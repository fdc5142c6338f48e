"""A request on its way through the engine: what its sender holds, and what the engine knows of it while it decodes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from tokenizers import Tokenizer

from pipelines.serving.answers import Chunk, FinishReason, Transcript
from pipelines.serving.prompts import Prompt
from pipelines.serving.sampling import Draws

logger = logging.getLogger(__name__)


class Ticket:
    """A request in the hands of whoever sent it. Every method may be called from any thread."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.submitted_at = time.monotonic()
        self.cancelled = False
        self.failure: Exception | None = None
        """What the chunk that says "error" stands for."""
        self._lock = threading.Lock()
        self._early: list[Chunk] = []
        self._listener: Callable[[Chunk], object] | None = None

    def cancel(self) -> None:
        """End the answer: its slot is free within one decode step. Without effect on one that has ended."""
        self.cancelled = True

    def set_listener(self, listener: Callable[[Chunk], object]) -> None:
        """Hand `listener` every chunk, in order; those that came before, at once and in this thread.

        Later ones come from the engine's thread, which waits for it: it must only pass the chunk on. A listener that
        raises is not called again, and the request is cancelled.

        Raises:
            RuntimeError: the request has had a listener, which alone knows what came; another one could wait for ever.
        """
        with self._lock:
            if self._listener is not None:
                raise RuntimeError("somebody listens to this request, or has listened: submit its prompt once more")
            self._listener = listener
            early, self._early = self._early, []
            for chunk in early:
                self._hand_over(chunk)

    def deliver(self, chunk: Chunk) -> None:
        """Called by the engine."""
        with self._lock:
            if self._listener is None:
                self._early.append(chunk)
            else:
                self._hand_over(chunk)

    def overdue(self, now: float) -> FinishReason | None:
        """Why the request ends at monotonic time `now` whatever it has, or None where it goes on."""
        if self.cancelled:
            return "cancelled"
        deadline = self.prompt.sampling.deadline_s
        return "deadline" if deadline is not None and now >= self.submitted_at + deadline else None

    def _hand_over(self, chunk: Chunk) -> None:
        assert self._listener is not None
        try:
            self._listener(chunk)
        except Exception:
            # The others' answers wait behind this call: they must not pay for it.
            logger.exception("the listener of a request failed; the request is cancelled")
            self._listener = _ignore
            self.cancelled = True
        if chunk.finish_reason is not None:
            # One that holds its ticket, as most do, would keep it and its picture until Python looks for garbage.
            self._listener = _ignore


def _ignore(chunk: Chunk) -> None:
    """The listener of a request that nobody listens to any more."""


class Row:
    """A request that has a slot, of `slot_length` positions."""

    def __init__(self, ticket: Ticket, slot_length: int, tokenizer: Tokenizer, eos_token_id: int) -> None:
        sampling = ticket.prompt.sampling
        self.ticket = ticket
        self.draws = Draws(sampling)
        self.length = len(ticket.prompt.input_ids)
        """Positions of the slot that are filled."""
        self.last_token = -1
        """Generated, and not yet read by the model."""
        self._max_tokens = min(sampling.max_tokens, slot_length - self.length)
        self._eos_token_id = eos_token_id
        self._transcript = Transcript(tokenizer, sampling.stop)
        self._num_tokens = 0
        self._unsent: list[int] = []

    def take(self, token_id: int) -> FinishReason | None:
        """Append a token; says how the answer ends with it, if it does."""
        self.draws.advance()
        if token_id == self._eos_token_id:
            return "stop"
        self.last_token = token_id
        self._num_tokens += 1
        self._unsent.append(token_id)
        if self._transcript.push(token_id):
            return "stop"
        return "length" if self._num_tokens >= self._max_tokens else None

    def send(self, reason: FinishReason | None = None, failure: Exception | None = None) -> None:
        """Deliver what is new, if there is text to show or the answer ends."""
        text = self._transcript.finish() if reason else self._transcript.release()
        if not text and not reason:
            return
        ids, self._unsent = self._unsent, []
        self.ticket.failure = failure
        self.ticket.deliver(Chunk(ids, text, reason, None if failure is None else describe(failure)))


def describe(failure: Exception) -> str:
    """An exception in a line."""
    return f"{type(failure).__name__}: {failure}"
