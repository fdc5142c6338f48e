"""Answers between the engine's thread, the event loop of its process, and the ingress.

An engine makes a token for every request every few milliseconds, and each of them would cost a wake-up here and a
message to another process. So a whole answer wakes its listener once, and a stream sends its first piece at once and
then what has gathered since, at a pace that nobody can see.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass

import torch

from pipelines.serving.answers import Chunk, FinishReason
from pipelines.serving.engine import Engine, EngineFull, Prompt, Ticket
from pipelines.serving.errors import ApiError

PACE_S = 0.02
PACE_PER_STREAM_S = 0.002  # many streams at once: fewer, larger pieces, so that sending never outweighs answering


@dataclass(frozen=True)
class Reply:
    """A piece of an answer, or all of it.

    Attributes:
        text: the next part of the answer.
        num_tokens: how many tokens the piece has.
        finish_reason: as in `Chunk`; None where more is to come.
        first_token_s: seconds from the engine's receipt to the answer's first text; in an answer's first piece.
    """

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None
    first_token_s: float | None = None

    @property
    def api_finish_reason(self) -> str:
        """In OpenAI's words, which have none for an answer whose time was over: it was cut, as by its length."""
        return "stop" if self.finish_reason == "stop" else "length"


class Desk:
    """Answers prompts by an engine, from an event loop."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._num_streams = 0

    async def answer(self, prompt: Prompt) -> Reply | ApiError:
        """The whole answer, or why there is none. Whoever stops waiting cancels the request."""
        try:
            mailbox = _Mailbox(self._submit(prompt), whole=True)
            try:
                return _reply(await mailbox.take(), mailbox, is_first=True)
            finally:
                mailbox.ticket.cancel()
        except ApiError as error:
            return error

    async def stream(self, prompt: Prompt) -> AsyncIterator[Reply | ApiError]:
        """The answer as it comes, or why it ends. Whoever stops listening cancels the request."""
        self._num_streams += 1
        try:
            mailbox = _Mailbox(self._submit(prompt), whole=False)
            try:
                async for reply in self._pieces(mailbox):
                    yield reply
            finally:
                mailbox.ticket.cancel()
        except ApiError as error:
            yield error
        finally:
            self._num_streams -= 1

    async def _pieces(self, mailbox: _Mailbox) -> AsyncIterator[Reply]:
        reply = _reply(await mailbox.take(), mailbox, is_first=True)
        while True:
            yield reply
            if reply.finish_reason is not None:
                return
            await asyncio.sleep(max(PACE_S, PACE_PER_STREAM_S * self._num_streams))
            reply = _reply(await mailbox.take(), mailbox, is_first=False)

    def _submit(self, prompt: Prompt) -> Ticket:
        try:
            return self.engine.submit(prompt)
        except EngineFull as error:
            raise ApiError(429, "too many requests are waiting; try again", "overloaded") from error
        except ValueError as error:
            raise ApiError(422, str(error), "prompt_too_long", "messages") from error
        except RuntimeError as error:
            raise ApiError(503, "the engine stops; try again", "unavailable") from error


class _Mailbox:
    """Carries a ticket's chunks from the engine's thread into the event loop that made it.

    Args:
        ticket: of a request that was just submitted.
        whole: wake the reader for the last chunk only.
    """

    def __init__(self, ticket: Ticket, whole: bool) -> None:
        self.ticket = ticket
        self.first_at: float | None = None
        self._whole = whole
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._chunks: deque[Chunk] = deque()
        self._ended = False
        self._wanted = False
        ticket.set_listener(self._put)

    async def take(self) -> list[Chunk]:
        """All chunks that have come since the last call, at least one; with `whole`, all there are."""
        self._ready.clear()
        self._wanted = True  # before the look below: a chunk that comes in between sets the event
        if not (self._ended or (self._chunks and not self._whole)):
            await self._ready.wait()
        self._wanted = False
        return [self._chunks.popleft() for _ in range(len(self._chunks))]

    def _put(self, chunk: Chunk) -> None:
        """Called in the engine's thread."""
        if self.first_at is None:
            self.first_at = time.monotonic()
        self._chunks.append(chunk)
        self._ended = chunk.finish_reason is not None
        if self._wanted and (self._ended or not self._whole):
            self._wanted = False
            self._loop.call_soon_threadsafe(self._ready.set)


def _reply(chunks: list[Chunk], mailbox: _Mailbox, is_first: bool) -> Reply:
    """The chunks as one piece.

    Raises:
        ApiError: the engine could not answer, or not in time.
    """
    reason = chunks[-1].finish_reason
    if reason == "error":
        raise _explain(mailbox.ticket.failure)
    num_tokens = sum(len(chunk.token_ids) for chunk in chunks)
    if is_first and reason == "deadline" and not num_tokens:
        raise ApiError(503, "no token came in time; try again later", "deadline")
    first_s = mailbox.first_at - mailbox.ticket.submitted_at if is_first and mailbox.first_at is not None else None
    return Reply("".join(chunk.text for chunk in chunks), num_tokens, reason, first_s)


def _explain(failure: Exception | None) -> ApiError:
    if isinstance(failure, torch.OutOfMemoryError):
        return ApiError(503, "the engine ran out of memory over this request; try again later", "out_of_memory")
    return ApiError(500, "the engine could not answer this request", "engine_error")
