"""The engines as the ingress sees them: whoever of them answers, and another one where that one is lost or full."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Protocol, TypeVar

from grpc import RpcError
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from pipelines.serving.engine import Prompt
from pipelines.serving.errors import ApiError
from pipelines.serving.replies import Reply

ATTEMPTS = 2  # not more: a request that kills its engine must not go round until all are dead
PAUSE_S = 0.2  # after one that was lost: Serve needs a moment to see that a replica is gone
_LOST = ("engine_error", "unavailable")
_FULL = "overloaded"
_FAILURES = (RayError, RayServeException, RpcError)  # the last where a connection ends in the middle of a message

T = TypeVar("T")


class Engines(Protocol):
    """Whatever answers prompts."""

    async def answer(self, prompt: Prompt) -> Reply:
        """The whole answer; raises `ApiError` where there is none."""

    def stream(self, prompt: Prompt) -> AsyncIterator[Reply]:
        """The answer in pieces; raises `ApiError` where it does not go on."""

    async def check(self) -> None:
        """Raise where no engine answers."""


class RemoteEngines:
    """The engines of a Serve deployment.

    An engine that dies takes its requests with it. One that has not sent a token to its client is asked of another
    engine: nobody can tell the difference. So is one that a full engine refuses: Serve's router goes by what it has
    last heard of the engines, and another one may have room.

    Args:
        handle: of the deployment.
        on_retry: called whenever that happens.
        several: whether there may be another engine.
    """

    def __init__(self, handle: DeploymentHandle, on_retry: Callable[[], None], several: bool) -> None:
        # gRPC whatever the environment of the process was that made the handle: see `transport`.
        self._handle = handle.options(_by_reference=False)
        self._streams = handle.options(_by_reference=False, stream=True)
        self._on_retry = on_retry
        self._several = several

    async def answer(self, prompt: Prompt) -> Reply:
        """See `Engines`."""
        for attempt in range(ATTEMPTS):
            error = await self._attempt(prompt)
            if isinstance(error, Reply):
                return error
            await self._before_retry(attempt, error)
        raise AssertionError("the last attempt raises")

    async def stream(self, prompt: Prompt) -> AsyncIterator[Reply]:
        """See `Engines`."""
        for attempt in range(ATTEMPTS):
            has_begun = False
            error: ApiError | None = None
            responses = self._streams.stream.remote(prompt)
            try:
                async for reply in responses:
                    if isinstance(reply, ApiError):
                        error = reply
                        break
                    has_begun = True
                    yield reply
            except _FAILURES as failure:
                error = _explain(failure)
            finally:
                responses.cancel()  # without effect on what has ended
            if error is None:
                return
            if has_begun:
                raise error
            await self._before_retry(attempt, error)

    async def check(self) -> None:
        """See `Engines`."""
        await self._handle.check_health.remote()

    async def collect(self, patience_s: float) -> list[Any]:
        """See `collect_from`."""
        return await collect_from(self._handle, patience_s)

    async def _attempt(self, prompt: Prompt) -> Reply | ApiError:
        response = self._handle.answer.remote(prompt)
        try:
            return await response
        except _FAILURES as failure:
            return _explain(failure)
        except asyncio.CancelledError:
            response.cancel()
            raise

    async def _before_retry(self, attempt: int, error: ApiError) -> None:
        is_full = error.code == _FULL and self._several
        if attempt + 1 == ATTEMPTS or not (is_full or error.code in _LOST):
            raise error
        self._on_retry()
        if not is_full:
            await asyncio.sleep(PAUSE_S * (attempt + 1))


async def collect_from(handle: DeploymentHandle, patience_s: float) -> list[Any]:
    """What `collect` of each replica gives, without those that are lost or do not answer within `patience_s`."""
    deadline = asyncio.get_running_loop().time() + patience_s

    async def wait(answer: Awaitable[T]) -> T | None:
        try:
            async with asyncio.timeout_at(deadline):
                return await answer
        except RayTaskError:  # a fault of ours
            raise
        except (*_FAILURES, TimeoutError):
            return None

    # Not `results_async`, of which one replica that does not answer takes the answers of all.
    replicas = await wait(handle.broadcast("collect")._fetch_replica_results_async()) or []
    answers = await asyncio.gather(*(wait(replica.get_async()) for replica in replicas))
    return [answer for answer in answers if answer is not None]


def _explain(failure: Exception) -> ApiError:
    """What a client is told of what Ray says; raises it where it is a fault of ours."""
    if isinstance(failure, BackPressureError):
        return ApiError(429, "too many requests are waiting; try again", "overloaded")
    if isinstance(failure, RayTaskError):
        raise failure
    return ApiError(503, "no engine can answer at the moment; try again", "unavailable")
