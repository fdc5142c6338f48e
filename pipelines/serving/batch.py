"""Continuous batching: requests join and leave between decode steps. No threads here; `engine.py` brings one.

One `step` is: let go of who is cancelled or out of time -> read a bounded number of waiting prompts into free slots
-> decode one token for every slot in use -> hand out what is new. Row i of `rows` has slot i.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from pipelines.serving.answers import Chunk, FinishReason
from pipelines.serving.decoder import Decoder
from pipelines.serving.engine_settings import EngineSettings
from pipelines.serving.images import ImageStore
from pipelines.serving.prompts import Prompt, check_prompt
from pipelines.serving.sampling import NO_TOKEN, choose_tokens
from pipelines.serving.slots import Slots
from pipelines.serving.tickets import Row, Ticket, describe

logger = logging.getLogger(__name__)


class EngineFull(RuntimeError):
    """As many requests wait as may wait; try again later."""


@dataclass(frozen=True)
class EngineStats:
    """What an engine does and has done. Counts are since its start."""

    waiting: int
    """Requests that have no slot yet."""
    running: int
    """Requests that have one: slots in use."""
    slots: int
    """Slots that there are."""
    batch_size: int
    """Rows of the last decode step."""
    prefill_tokens: int
    """Prompt tokens read or copied, visual tokens included, padding not."""
    generated_tokens: int
    images_encoded: int
    image_cache_hits: int
    """Images that were asked for and had not to be encoded."""
    image_cache_bytes: int
    last_step_at: float
    """`time.monotonic()` at the end of the last step."""


class ContinuousBatch:
    """The requests of one model, waiting and running.

    `submit` and `stats` may be called from any thread, everything else from one.
    """

    def __init__(
        self, model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, settings: EngineSettings
    ) -> None:
        self.settings = settings
        self.config = model.config
        self.slots = Slots.allocate(model.config.text_config, settings, model.dtype, model.device)
        self.images = ImageStore(model, settings.image_cache_bytes)
        graphs = settings.cuda_graphs and model.device.type == "cuda"
        self.decoder = Decoder(model, self.slots, self.images, graphs)
        self.rows: list[Row] = []
        self.last_step_at = time.monotonic()
        # One of its own: a tokenizer refuses to decode in one thread while another one encodes with it.
        self._tokenizer = Tokenizer.from_str(processor.tokenizer.backend_tokenizer.to_str())
        self._eos_token_id = processor.eos_token_id
        self._waiting: deque[Ticket] = deque()
        self._lock = threading.Lock()  # of `_waiting`, `_joining`
        self._joining: list[Ticket] = []  # neither wait nor have a row yet
        self._stepping = False
        self._batch_size = self._prefill_tokens = self._generated_tokens = 0

    @property
    def busy(self) -> bool:
        """Whether a step has anything to do, or is at it."""
        return bool(self.rows or self._waiting or self._stepping)

    def has_room(self) -> bool:
        """Whether the next request would be let in."""
        with self._lock:
            return not self._is_full()

    def _is_full(self) -> bool:
        """Who gets a free slot at the next step waits for none. To be called with the lock."""
        free = self.slots.num_slots - len(self.rows) - len(self._joining)
        return len(self._waiting) >= free + self.settings.max_waiting

    def submit(self, prompt: Prompt) -> Ticket:
        """Let a prompt wait for a slot.

        Raises:
            TypeError, ValueError: it is no prompt, or one that does not fit together, or into any slot.
            EngineFull: `max_waiting` requests wait for a slot.
        """
        self.check(prompt)
        ticket = Ticket(prompt)
        with self._lock:
            if self._is_full():
                raise EngineFull(f"{self.settings.max_waiting} requests wait for a slot, as many as may (max_waiting)")
            if not self.busy:
                self.last_step_at = time.monotonic()
            self._waiting.append(ticket)
        return ticket

    def check(self, prompt: Prompt) -> None:
        """Raise as `check_prompt` for a prompt that could never be answered."""
        check_prompt(prompt, self.config, self.slots.length)

    @torch.inference_mode()
    def step(self) -> None:
        """Move every request on, by one token where it has a slot."""
        self._stepping = True
        try:
            self._drop_overdue()
            group = self._next_group()
            if group:
                self._prefill(group)
            if self.rows:
                self._decode()
        finally:
            self._stepping = False
            self.last_step_at = time.monotonic()

    def fail_all(self, failure: Exception) -> None:
        """End every request, because of what concerns them all. No slot moves, for that may be what failed."""
        for slot in reversed(range(len(self.rows))):
            self._end(slot, "error", failure)
        with self._lock:
            others = [*self._joining, *self._waiting]
            self._joining.clear()
            self._waiting.clear()
        for ticket in others:
            _refuse(ticket, "error", failure)

    def stats(self) -> EngineStats:
        """Figures of now."""
        return EngineStats(
            waiting=len(self._waiting),
            running=len(self.rows),
            slots=self.slots.num_slots,
            batch_size=self._batch_size,
            prefill_tokens=self._prefill_tokens,
            generated_tokens=self._generated_tokens,
            images_encoded=self.images.num_encoded,
            image_cache_hits=self.images.num_hits,
            image_cache_bytes=self.images.num_bytes,
            last_step_at=self.last_step_at,
        )

    def _drop_overdue(self) -> None:
        now = time.monotonic()
        for slot in reversed(range(len(self.rows))):
            reason = self.rows[slot].ticket.overdue(now)
            if reason:
                self._end(slot, reason)
        with self._lock:
            overdue = [(ticket, reason) for ticket in self._waiting if (reason := ticket.overdue(now))]
            for ticket, _ in overdue:
                self._waiting.remove(ticket)
        for ticket, reason in overdue:
            _refuse(ticket, reason)

    def _next_group(self) -> list[Ticket]:
        """Who is next: first come, first served, up to the budgets of one step, and at least one if there is a slot."""
        group = self._joining
        longest = 0
        new_images: set[str] = set()
        with self._lock:
            while self._waiting and len(self.rows) + len(group) < self.slots.num_slots:
                prompt = self._waiting[0].prompt
                longest = max(longest, len(prompt.input_ids))
                if prompt.image_key is not None and prompt.image_key not in self.images:
                    new_images.add(prompt.image_key)
                too_long = longest * (len(group) + 1) > self.settings.prefill_tokens
                if group and (too_long or len(new_images) > self.settings.image_batch_size):
                    break
                group.append(self._waiting.popleft())
        return list(group)

    def _prefill(self, group: Sequence[Ticket]) -> None:
        """Give each a slot and its first token: together or, where that fails, one by one, so that only one fails."""
        first = len(self.rows)
        rows: list[Row] = []

        def join() -> list[int]:
            rows.extend(Row(ticket, self.slots.length, self._tokenizer, self._eos_token_id) for ticket in group)
            logits = self.decoder.prefill([ticket.prompt for ticket in group], first)
            return choose_tokens(logits, [row.draws for row in rows])

        tokens, failure = self._attempt(len(group), join)
        if failure is not None and len(group) > 1:
            for ticket in group:
                self._prefill([ticket])
            return
        with self._lock:
            del self._joining[: len(group)]
            if failure is None:
                self.rows += rows
        if failure is not None:
            _refuse(group[0], "error", failure)
            return
        self._prefill_tokens += sum(row.length for row in rows)
        self._take(first, tokens)

    def _decode(self) -> None:
        ids, positions = [row.last_token for row in self.rows], [row.length for row in self.rows]
        draws = [row.draws for row in self.rows]
        tokens, failure = self._attempt(
            len(self.rows), lambda: choose_tokens(self.decoder.decode(ids, positions), draws)
        )
        if isinstance(failure, torch.OutOfMemoryError):
            # Nothing is lost but time: the next step writes the same positions again, with a row less.
            self._end(len(self.rows) - 1, "error", failure)
        elif failure is not None:
            self.fail_all(failure)
        else:
            self._batch_size = len(self.rows)
            for row in self.rows:
                row.length += 1
            self._take(0, tokens)

    def _attempt(self, num_rows: int, forward: Callable[[], list[int]]) -> tuple[list[int], Exception | None]:
        """The next tokens of `num_rows` requests, or what went wrong."""
        try:
            return forward(), None
        except Exception as error:
            logger.warning("a step over %d requests failed", num_rows, exc_info=True)
            failure = error.with_traceback(None)  # whose frames would keep the memory that is to be freed
        if isinstance(failure, torch.OutOfMemoryError):
            self.images.clear()
            if self.slots.states.is_cuda:
                torch.cuda.empty_cache()
        return [], failure

    def _take(self, first: int, tokens: Sequence[int]) -> None:
        """Give the rows from `first` on their tokens, tell their senders, and let go of those that end."""
        self._generated_tokens += len(tokens)
        ended: list[tuple[int, FinishReason]] = []
        for slot, token_id in enumerate(tokens, first):
            row = self.rows[slot]
            reason = row.take(token_id) if token_id != NO_TOKEN else "error"
            if reason is None:
                row.send()
            else:
                ended.append((slot, reason))
        for slot, reason in reversed(ended):
            failure = None
            if reason == "error":
                failure = RuntimeError("the model gives logits that are not finite")
                self.slots.clear(slot)
            self._end(slot, reason, failure)

    def _end(self, slot: int, reason: FinishReason, failure: Exception | None = None) -> None:
        """Free a slot; the row of the last slot moves into it. From the last to the first, if there are several."""
        row, last = self.rows[slot], len(self.rows) - 1
        if slot < last:
            self.slots.move(last, slot, self.rows[last].length)  # may fail: until then both are where they were
            self.rows[slot] = self.rows[last]
        self.rows.pop()
        row.send(reason, failure)


def _refuse(ticket: Ticket, reason: FinishReason, failure: Exception | None = None) -> None:
    """End a request that has no slot."""
    ticket.failure = failure
    ticket.deliver(Chunk([], "", reason, None if failure is None else describe(failure)))
