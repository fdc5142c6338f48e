"""What stands behind the HTTP routes of one ingress: its policy, and the way from a request's body to a prompt."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from flashsloth.conversation import ConversationError
from pipelines.serving.authentication import Clients, RateLimit
from pipelines.serving.engine import Encoder, Prompt
from pipelines.serving.engines import Engines
from pipelines.serving.errors import ApiError
from pipelines.serving.image_urls import Hold, ImageFetcher
from pipelines.serving.metrics import IngressMetrics
from pipelines.serving.protocol import ChatRequest, parse_request, read_messages, read_sampling
from pipelines.serving.replies import Reply
from pipelines.serving.settings import Limits, Policy
from pipelines.serving.single_flight import SingleFlight

HEALTH_TIMEOUT_S = 10
HEALTH_HOLDS_S = 1  # /health is open to everybody: no finding, good or bad, may cost a forward pass each time
GRACE_S = 5  # beyond the deadline, which the engine itself keeps: only one that is lost needs more
CLIENT_GONE = 499
# Threads that read requests. More of them than cores would only take the interpreter from each other; more than a few
# are never busy, for what they do between two pictures holds the interpreter.
READERS = min(4, os.cpu_count() or 1)

T = TypeVar("T")


@dataclass(frozen=True)
class Question:
    """A request that may go to an engine."""

    prompt: Prompt
    is_stream: bool
    include_usage: bool


class Service:
    """One ingress.

    Args:
        model_name: under which clients ask for the model.
        encoder: turns conversations into prompts.
        engines: answer prompts.
        metrics: counts what happens.
        policy: what requests may ask for; `adopt` another one at any time.
        read_metrics: the text of `GET /metrics`.
        model_hash: of the checkpoint, as `checkpoint_identity` gives it.
    """

    def __init__(
        self,
        model_name: str,
        encoder: Encoder,
        engines: Engines,
        metrics: IngressMetrics,
        policy: Policy,
        read_metrics: Callable[[], Awaitable[bytes]],
        model_hash: str,
    ) -> None:
        self.model_name = model_name
        self.encoder = encoder
        self.engines = engines
        self.metrics = metrics
        self.read_metrics = read_metrics
        self.model_hash = model_hash
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="reader")
        self._num_open = self._num_body_bytes = 0
        self._check = SingleFlight(lambda: asyncio.wait_for(engines.check(), HEALTH_TIMEOUT_S), HEALTH_HOLDS_S)
        self._rate_limit = RateLimit(policy.limits.requests_per_minute)
        self.adopt(policy)

    @property
    def limits(self) -> Limits:
        """What a request may ask for now."""
        return self.policy.limits

    @property
    def tiling(self) -> str:
        """How the model looks at pictures: "base" or "hd"."""
        return self.encoder.processor.image_processor.tiling

    def adopt(self, policy: Policy) -> None:
        """Go by another policy, from the next request on."""
        self.policy = policy
        self.clients = Clients(policy.tokens)
        if policy.limits.requests_per_minute != self._rate_limit.per_minute:  # else who has asked has asked
            self._rate_limit = RateLimit(policy.limits.requests_per_minute)
        self._images = ImageFetcher(policy.image_hosts, policy.limits.max_body_bytes)

    def enter(self, client: str) -> Visit:
        """Let a request in; raises `ApiError` (429) where its client asks too often, or too many are inside."""
        self._rate_limit.take(client)
        if self._num_open >= self.limits.max_open_requests:
            raise ApiError(429, f"{self._num_open} requests are open; try again", "overloaded")
        return Visit(self)

    async def read(self, body: bytes, hold: Hold = lambda num_bytes: None) -> Question:
        """Check a request and encode it; raises `ApiError` for whatever is wrong with it.

        Args:
            body: the request's.
            hold: is told of the bytes of images that are fetched for it, as they come, and may raise.
        """
        limits = self.limits
        # In a thread: parsing and decoding megabytes takes a while, and others want to be heard meanwhile.
        loop = asyncio.get_running_loop()
        request, prompt = await loop.run_in_executor(self._readers, self._read, body, limits)
        if prompt is None:
            fetched = {url: await self._images.fetch(url, hold) for url in request.image_addresses}
            prompt = await loop.run_in_executor(self._readers, self._encode, request, limits, fetched)
        options = request.stream_options
        return Question(prompt, bool(request.stream), options is not None and bool(options.include_usage))

    async def check(self) -> None:
        """Raise `ApiError` (503) where no engine answers."""
        try:
            await self._check()
        except Exception as error:  # whatever keeps the engine from answering: that is the finding
            raise ApiError(503, f"no engine answers ({type(error).__name__})", "unavailable") from error

    def _read(self, body: bytes, limits: Limits) -> tuple[ChatRequest, Prompt | None]:
        """The request, and its prompt unless images have to be fetched for it."""
        request = parse_request(body, self.model_name)
        read_sampling(request, limits)  # which may refuse it, before an image is fetched or decoded
        return request, None if request.image_addresses else self._encode(request, limits, {})

    def _encode(self, request: ChatRequest, limits: Limits, fetched: Mapping[str, bytes]) -> Prompt:
        sampling = read_sampling(request, limits)
        low_side = self.encoder.processor.image_processor.size if self.tiling == "hd" else None
        messages, image = read_messages(request, limits, low_side, fetched)
        try:
            return self.encoder.prompt(messages, image, sampling, max_length=limits.max_prompt_tokens)
        except ConversationError as error:
            raise ApiError(422, error.detail, error.reason, "messages") from error


class Visit:
    """One request, from the door until its last byte, counted.

    Attributes:
        expires_at: by the loop's clock, when it must have come and been read; once `sent`, have been answered.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._started_at = time.monotonic()
        self.expires_at = self._in_time()
        self._num_body_bytes = 0
        self._is_open = True
        service._num_open += 1
        service.metrics.opened()

    @contextlib.asynccontextmanager
    async def closed_on_error(self) -> AsyncIterator[None]:
        """Close the visit where the block raises; one that goes well is closed by whoever sends the last byte."""
        try:
            yield
        except ApiError as error:
            self.close(error.status)
            raise
        except asyncio.CancelledError:
            self.close(CLIENT_GONE)
            raise
        except BaseException:
            self.close(500)
            raise

    def hold(self, num_bytes: int) -> None:
        """So much more has come, of the body or of an image that it names.

        Raises:
            ApiError: 429, it has no room beside what others hold.
        """
        held = self._service._num_body_bytes
        if held + num_bytes > self._service.limits.max_open_body_bytes:
            raise ApiError(429, f"{held} bytes of requests are being read; try again", "overloaded")
        self._service._num_body_bytes += num_bytes
        self._num_body_bytes += num_bytes

    async def wait(self, work: Awaitable[T]) -> T:
        """What comes of `work`, the prompt or a part of the answer; raises `ApiError` (503) where it takes too long."""
        try:
            async with asyncio.timeout_at(self.expires_at):
                return await work
        except TimeoutError as error:
            raise ApiError(503, "no answer came in time; try again later", "deadline") from error

    def first_token(self, reply: Reply) -> None:
        """The first piece is there: whole answers say themselves when their first token was."""
        elapsed = time.monotonic() - self._started_at
        if reply.finish_reason is not None and reply.first_token_s is not None:
            elapsed = min(elapsed, self._sent_at - self._started_at + reply.first_token_s)
        self._service.metrics.first_token(elapsed)

    def sent(self) -> None:
        """The prompt goes to an engine. The body has been let go of, and the time of the answer begins."""
        self._let_go()
        self._sent_at = time.monotonic()
        # When to give up is known to the engine; this is for one that is lost without a word.
        self.expires_at = self._in_time() + GRACE_S

    def close(self, status: int) -> None:
        """The request has ended."""
        if self._is_open:
            self._let_go()
            self._is_open = False
            self._service._num_open -= 1
            self._service.metrics.closed(status, time.monotonic() - self._started_at)

    def _in_time(self) -> float:
        return asyncio.get_running_loop().time() + self._service.limits.deadline_s

    def _let_go(self) -> None:
        self._service._num_body_bytes -= self._num_body_bytes
        self._num_body_bytes = 0
