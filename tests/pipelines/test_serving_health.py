"""Looking after engines costs one look, however many ask for it at once."""

from __future__ import annotations

import asyncio
import gc
import time
from pathlib import Path
from typing import Any

import pytest

import pipelines.serving.app
from pipelines.serving.app import EngineReplica
from pipelines.serving.errors import ApiError
from pipelines.serving.service import HEALTH_HOLDS_S, Service
from pipelines.serving.settings import ServeArgs
from tests.serving_http import Backend

NUM_CALLS = 500


class Looks:
    """Stands where an engine is asked how it is."""

    def __init__(self) -> None:
        self.count = 0
        self.error: Exception | None = None
        self.release = asyncio.Event()

    async def __call__(self) -> None:
        self.count += 1
        await self.release.wait()
        if self.error:
            raise self.error


@pytest.fixture
def looks(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> Looks:
    looks = Looks()
    monkeypatch.setattr(backend, "check", looks)
    return looks


async def begun(calls: list[asyncio.Task[None]]) -> list[asyncio.Task[None]]:
    """The tasks, each of which waits for its outcome."""
    for _ in range(3):
        await asyncio.sleep(0)
    return calls


async def check_all(service: Service) -> list[asyncio.Task[None]]:
    return await begun([asyncio.create_task(service.check()) for _ in range(NUM_CALLS)])


@pytest.mark.parametrize("error", [None, RuntimeError("the model gives logits that are not finite")])
def test_all_who_ask_at_once_share_a_look_and_its_finding(
    service: Service, looks: Looks, error: Exception | None
) -> None:
    async def ask() -> list[Any]:
        looks.error = error
        calls = await check_all(service)
        looks.release.set()
        return await asyncio.gather(*calls, return_exceptions=True)

    findings = asyncio.run(ask())
    assert looks.count == 1
    if error is None:
        assert findings == [None] * NUM_CALLS
    else:
        assert {(finding.status, finding.message) for finding in findings} == {
            (503, "no engine answers (RuntimeError)")
        }


def test_who_leaves_does_not_end_the_look_of_the_others(service: Service, looks: Looks) -> None:
    async def ask() -> list[Any]:
        calls = await check_all(service)
        calls[0].cancel()  # the one that began it
        await asyncio.sleep(0)
        looks.release.set()
        return await asyncio.gather(*calls, return_exceptions=True)

    first, *others = asyncio.run(ask())
    assert isinstance(first, asyncio.CancelledError)
    assert (looks.count, others) == (1, [None] * (NUM_CALLS - 1))


def test_a_look_that_nobody_is_left_to_hear_of_ends_without_a_complaint(
    service: Service, looks: Looks, caplog: pytest.LogCaptureFixture
) -> None:
    async def ask() -> None:
        looks.error = RuntimeError("device lost")
        (call,) = await begun([asyncio.create_task(service.check())])
        call.cancel()
        await asyncio.gather(call, return_exceptions=True)
        looks.release.set()
        await asyncio.sleep(0.01)
        with pytest.raises(ApiError, match="no engine answers"):
            await service.check()
        service._check._task = None
        gc.collect()

    asyncio.run(ask())
    assert (looks.count, caplog.text) == (1, "")


@pytest.mark.parametrize("error", [None, RuntimeError("device lost")])
def test_a_finding_holds_for_a_while(
    service: Service, looks: Looks, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    clock = [time.monotonic()]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])

    async def is_well() -> bool:
        try:
            await service.check()
        except ApiError:
            return False
        return True

    async def ask() -> None:
        looks.release.set()
        looks.error = error
        assert [await is_well() for _ in range(3)] == [error is None] * 3
        assert looks.count == 1
        looks.error = None if error else RuntimeError("device lost")
        clock[0] += HEALTH_HOLDS_S
        assert await is_well() == (error is not None)
        assert looks.count == 2

    asyncio.run(ask())


def test_a_look_that_was_cut_off_is_none(service: Service, looks: Looks) -> None:
    """As where the event loop has ended under it."""

    async def begin() -> None:
        await begun([asyncio.create_task(service.check())])

    async def ask() -> None:
        looks.release = asyncio.Event()
        looks.release.set()
        await service.check()

    asyncio.run(begin())
    asyncio.run(ask())
    assert looks.count == 2


@pytest.fixture
def replica(tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> EngineReplica:
    monkeypatch.setattr(pipelines.serving.app, "_replica_name", lambda: "engine")
    return EngineReplica(ServeArgs(checkpoint=str(tiny_checkpoint), device="cpu", wedged_after_s=7))


def test_a_replica_looks_once_for_all_who_ask_at_once(replica: EngineReplica, monkeypatch: pytest.MonkeyPatch) -> None:
    patience: list[float] = []

    def look(patience_s: float) -> None:
        patience.append(patience_s)
        time.sleep(0.1)
        raise RuntimeError("the model gives logits that are not finite")

    monkeypatch.setattr(replica._engine, "check", look)

    async def ask(num_calls: int) -> list[Any]:
        return await asyncio.gather(*(replica.check_health() for _ in range(num_calls)), return_exceptions=True)

    findings = asyncio.run(ask(50))
    assert patience == [7]
    assert {str(finding) for finding in findings} == {"the model gives logits that are not finite"}
    assert len(asyncio.run(ask(1))) == 1
    assert patience == [7, 7], "Serve hears what is, not what was"
