"""Engines that die, hang, run out of memory or are exchanged, while requests come in."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from ray import serve

import pipelines.serving.app
from pipelines.serving.app import build_app
from pipelines.serving.engine import EngineSettings
from pipelines.serving.settings import Limits, ServeArgs
from tests.serving import (
    APPLICATION,
    QUIET,
    Load,
    read_metrics,
    replica_processes,
    request_body,
    running_service,
    total,
    until,
)
from tests.serving_faults import OUT_OF_MEMORY, WEDGE, FaultyReplica

pytestmark = pytest.mark.ray

START_S = 90


@pytest.fixture(scope="module")
def args(tiny_checkpoint: Path) -> ServeArgs:
    return ServeArgs(
        checkpoint=str(tiny_checkpoint),
        model_name="tiny",
        device="cpu",
        num_replicas=2,
        num_ingress_replicas=2,
        num_cpus=0.5,
        health_check_period_s=1,
        health_check_timeout_s=10,
        wedged_after_s=3,
        engine=EngineSettings(max_slots=8),
        limits=Limits(deadline_s=90),
    )


@pytest.fixture(scope="module")
def address(ray_session: None, args: ServeArgs) -> Iterator[str]:
    """Two engines and two ingresses."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines.serving.app, "EngineReplica", FaultyReplica)
        with running_service(args) as address:
            yield address


def short_and_long(source: random.Random) -> dict[str, Any]:
    return request_body(source.randrange(100), source.randint(4, 200), stream=source.random() < 0.3)


async def engines(address: str) -> set[str]:
    return set((await read_metrics(address))["flashsloth_engine_slots"])


async def two_engines(address: str) -> set[str]:
    """Return their names once there are two that answer."""
    found: set[str] = set()

    async def both() -> bool:
        nonlocal found
        try:
            found = await engines(address)
        except (AssertionError, KeyError, aiohttp.ClientError):
            found = set()
        return len(found) == 2

    await until(both, START_S, "two engines")
    return found


def test_one_request_without_memory_fails_alone(address: str) -> None:
    async def check() -> None:
        before = await two_engines(address)
        load = Load(address)
        async with aiohttp.ClientSession() as session:
            hungry = load.ask(session, request_body(0, OUT_OF_MEMORY))
            others = [load.ask(session, request_body(seed, 50)) for seed in range(7)]
            assert await asyncio.gather(hungry, *others) == ["503"] + ["200"] * 7
        assert (await engines(address), load.missing_retry_after) == (before, 0)

    asyncio.run(check())


def test_an_engine_that_is_killed_is_replaced_and_its_requests_are_asked_again(address: str) -> None:
    async def check() -> None:
        before = await two_engines(address)
        load = Load(address)
        async with load.running(12, short_and_long):
            await until(lambda: reached(load, 20), START_S, "20 answers")
            replica_processes("Engine")[0].kill()
            done = sum(load.outcomes.values())
            await until(lambda: reached(load, done + 60), START_S, "60 answers after the kill")
        after = await two_engines(address)
        # What had sent text already cannot be asked again, and says so; nobody else notices.
        assert set(load.outcomes) <= {"200", "broken"}, load.outcomes
        assert load.outcomes["broken"] <= 8
        assert len(before & after) == 1

    asyncio.run(check())


def test_an_engine_that_hangs_is_replaced_and_its_requests_are_asked_again(address: str) -> None:
    async def check() -> None:
        before = await two_engines(address)
        load = Load(address)
        async with aiohttp.ClientSession() as session:
            hanging = {**request_body(0, WEDGE), "seed": int(time.time()) + 2}  # a second time, it does not
            asked = [load.ask(session, hanging)] + [load.ask(session, request_body(seed, 8)) for seed in range(12)]
            assert await asyncio.gather(*asked) == ["200"] * 13
        assert len(before & await two_engines(address)) == 1

    asyncio.run(check())


def test_the_metrics_show_who_answers_while_others_are_lost(address: str) -> None:
    async def check() -> None:
        before = await two_engines(address)
        stopped = replica_processes("Engine")[0]
        stopped.suspend()
        try:
            shown = await engines(address)
        finally:
            stopped.resume()
        assert len(shown) == len(shown & before) == 1
        assert await engines(address) == before

        for process in replica_processes("Engine"):
            process.kill()
        while len(after := set((await read_metrics(address)).get("flashsloth_engine_slots", ()))) < 2 or after & before:
            await asyncio.sleep(0.1)

    asyncio.run(asyncio.wait_for(check(), 2 * START_S))


def test_a_rolling_update_under_load_loses_no_request(address: str, args: ServeArgs) -> None:
    async def check() -> None:
        before = await two_engines(address)
        load = Load(address)
        update = args.model_copy(update={"limits": Limits(deadline_s=90, max_tokens=900)})
        async with load.running(4, short_and_long, pause_s=1):
            await until(lambda: reached(load, 10), START_S, "10 answers")
            await asyncio.to_thread(serve.run, build_app(update), name=APPLICATION, logging_config=QUIET)
            done = sum(load.outcomes.values())
            await until(lambda: reached(load, done + 20), START_S, "20 answers after the update")
        assert set(load.outcomes) == {"200"}, load.outcomes
        assert not before & await two_engines(address)
        assert await total(address, "engine_slots_used") == 0

    asyncio.run(check())


async def reached(load: Load, count: int) -> bool:
    return sum(load.outcomes.values()) >= count
