"""Which engine is asked when one cannot answer, shown with engines that fail as they are told."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator, Iterator
from typing import Any

import pytest

from pipelines.serving import engines
from pipelines.serving.engine import Prompt
from pipelines.serving.engines import RemoteEngines
from pipelines.serving.errors import ApiError
from pipelines.serving.replies import Reply

FULL = ApiError(429, "too many requests are waiting; try again", "overloaded")
LOST = ApiError(503, "the engine stops; try again", "unavailable")
WRONG = ApiError(422, "too long", "prompt_too_long")
ANSWER = Reply("Two", 1, "stop")


class Response:
    """What one engine says, at once or as a stream."""

    def __init__(self, outcome: Reply | ApiError) -> None:
        self._outcome = outcome

    def __await__(self) -> Generator[Any, None, Reply | ApiError]:
        yield from asyncio.sleep(0).__await__()
        return self._outcome

    async def __aiter__(self) -> AsyncIterator[Reply | ApiError]:
        yield self._outcome

    def cancel(self) -> None: ...


class Handle:
    """The handle of a deployment whose engines give `outcomes`, one after the other."""

    def __init__(self, outcomes: Iterator[Reply | ApiError]) -> None:
        self._outcomes = outcomes
        self.answer = self.stream = self

    def options(self, **_: Any) -> Handle:
        return self

    def remote(self, _: Prompt) -> Response:
        return Response(next(self._outcomes))


async def ask(remote: RemoteEngines, stream: bool) -> Reply | str:
    """The answer, or the code of the error."""
    prompt = Prompt([1], [0])
    try:
        return await anext(remote.stream(prompt)) if stream else await remote.answer(prompt)
    except ApiError as error:
        return error.code


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("outcomes", "several", "expected", "num_pauses"),
    [
        ([FULL, ANSWER], True, ANSWER, 0),
        ([FULL, FULL], True, "overloaded", 0),
        ([FULL, LOST], True, "unavailable", 0),
        ([LOST, FULL], True, "overloaded", 1),
        ([FULL], False, "overloaded", 0),  # it would be the same one that is asked again
        ([LOST, ANSWER], False, ANSWER, 1),  # but one that is lost is replaced
        ([WRONG], True, "prompt_too_long", 0),
    ],
)
def test_another_engine_is_asked_where_one_is_lost_or_full(
    outcomes: list[Reply | ApiError],
    several: bool,
    expected: Reply | str,
    num_pauses: int,
    stream: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A full one says so at once, and nothing has to be waited for before the next is asked."""
    pauses: list[float] = []
    retries: list[bool] = []
    sleep = asyncio.sleep

    async def pause(seconds: float) -> None:
        pauses.append(seconds)
        await sleep(0)

    remote = RemoteEngines(Handle(iter(outcomes)), lambda: retries.append(True), several)  # type: ignore[arg-type]
    monkeypatch.setattr(engines.asyncio, "sleep", pause)
    assert asyncio.run(ask(remote, stream)) == expected
    assert len([seconds for seconds in pauses if seconds]) == num_pauses
    assert len(retries) == len(outcomes) - 1
