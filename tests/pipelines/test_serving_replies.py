"""Between engine and ingress: few messages, nothing lost, and no slot held for somebody who has gone."""

from __future__ import annotations

import asyncio
import gc
import pickle
import weakref
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch

from pipelines.serving.engine import Engine, EngineSettings, Prompt
from pipelines.serving.errors import ApiError
from pipelines.serving.replies import Desk, Reply
from tests.fixtures.tiny import build_processor, build_tiny_model
from tests.prompts import mixed_prompts, sampled

PATIENCE_S = 30


@pytest.fixture
def engine() -> Iterator[Engine]:
    processor = build_processor()
    settings = EngineSettings(max_slots=2, max_waiting=2)
    with Engine(build_tiny_model(processor), processor, settings) as engine:
        yield engine


def prompt_of(engine: Engine, **changes: Any) -> Prompt:
    return sampled(mixed_prompts(engine.processor)[0], **changes)


async def pieces_of(desk: Desk, prompt: Prompt) -> list[Reply | ApiError]:
    return [reply async for reply in desk.stream(prompt)]


async def free(engine: Engine) -> None:
    """Return when no slot is in use any more."""
    async with asyncio.timeout(PATIENCE_S):
        while engine.stats().running or engine.stats().waiting:
            await asyncio.sleep(0.001)


def test_a_request_that_has_ended_is_let_go_of_at_once(engine: Engine) -> None:
    """Python looks for garbage seldom, and each request has a picture."""

    async def ask() -> list[bool]:
        desk = Desk(engine)
        prompts = [prompt_of(engine, max_tokens=3) for _ in range(2)]
        held = [weakref.ref(prompt) for prompt in prompts]
        assert isinstance(await desk.answer(prompts.pop()), Reply)
        assert all(isinstance(piece, Reply) for piece in await pieces_of(desk, prompts.pop()))
        await free(engine)
        with suppress(TimeoutError):
            async with asyncio.timeout(PATIENCE_S):
                while any(prompt() for prompt in held):  # the engine's thread comes to its end of the step
                    await asyncio.sleep(0.001)
        return [prompt() is not None for prompt in held]

    gc.collect()
    gc.disable()
    try:
        assert asyncio.run(ask()) == [False, False]
    finally:
        gc.enable()


def test_whole_and_in_pieces_it_is_the_engines_answer(engine: Engine) -> None:
    prompt = prompt_of(engine, max_tokens=60)
    (expected,) = engine.generate([prompt])

    async def ask() -> tuple[Any, list[Any]]:
        desk = Desk(engine)
        return await desk.answer(prompt), await pieces_of(desk, prompt)

    whole, pieces = asyncio.run(ask())
    assert (whole.text, whole.num_tokens, whole.finish_reason) == (expected.text, 60, expected.finish_reason)
    assert "".join(piece.text for piece in pieces) == expected.text
    assert sum(piece.num_tokens for piece in pieces) == 60
    assert [piece.finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert [piece.first_token_s is not None for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert 0 < whole.first_token_s < PATIENCE_S


def test_the_first_piece_comes_at_once_and_the_rest_in_few(engine: Engine) -> None:
    async def ask() -> list[Any]:
        return await pieces_of(Desk(engine), prompt_of(engine, max_tokens=200))

    pieces = asyncio.run(ask())
    assert pieces[0].num_tokens < 20
    assert len(pieces) < 60  # 200 tokens, of which each would be a message to another process


def test_who_stops_listening_frees_the_slot_within_a_step(engine: Engine) -> None:
    async def ask() -> int:
        desk = Desk(engine)
        stream = desk.stream(prompt_of(engine, max_tokens=900))
        await anext(stream)
        await stream.aclose()
        before = engine.stats().generated_tokens
        await free(engine)
        return engine.stats().generated_tokens - before

    assert asyncio.run(ask()) <= 2  # the step that was under way, and none that begins after it


@pytest.mark.parametrize("whole", [True, False])
def test_a_cancelled_task_frees_the_slot(engine: Engine, whole: bool) -> None:
    async def ask() -> None:
        desk, prompt = Desk(engine), prompt_of(engine, max_tokens=900)
        task = asyncio.create_task(desk.answer(prompt) if whole else pieces_of(desk, prompt))
        async with asyncio.timeout(PATIENCE_S):
            while not engine.stats().running:
                await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await free(engine)

    asyncio.run(ask())
    assert engine.stats().generated_tokens < 900


def test_refusals_are_values(engine: Engine) -> None:
    async def ask() -> tuple[Any, ...]:
        desk = Desk(engine)
        long = prompt_of(engine, max_tokens=100_000)
        too_long = [await desk.answer(long), *(await pieces_of(desk, long))]
        waiting = []
        for count in (2, 4):  # two slots, then two places to wait
            while len(waiting) < count:
                waiting.append(asyncio.create_task(desk.answer(prompt_of(engine, max_tokens=900))))
            async with asyncio.timeout(PATIENCE_S):
                while (stats := engine.stats()).running + stats.waiting < count or stats.running < 2:
                    await asyncio.sleep(0.001)
        full = await desk.answer(prompt_of(engine))
        for task in waiting:
            task.cancel()
        await free(engine)
        engine.close()
        return *too_long, full, await desk.answer(prompt_of(engine))

    found = [(error.status, error.code) for error in asyncio.run(ask())]
    too_long = (422, "prompt_too_long")
    assert found == [too_long, too_long, (429, "overloaded"), (503, "unavailable")]


def test_one_request_without_memory_fails_alone(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator says so for one prompt, as a GPU's would; its neighbours and those after it are answered."""
    prompts = mixed_prompts(engine.processor)
    hungry, other = prompts[3], prompts[0]
    prefill = engine._batch.decoder.prefill

    def scarce(group: Any, slot: int) -> torch.Tensor:
        if any(prompt.input_ids == hungry.input_ids for prompt in group):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return prefill(group, slot)

    monkeypatch.setattr(engine._batch.decoder, "prefill", scarce)

    async def ask() -> list[Any]:
        desk = Desk(engine)
        return [*(await asyncio.gather(desk.answer(hungry), desk.answer(other))), await desk.answer(other)]

    failed, neighbour, after = asyncio.run(ask())
    assert (failed.status, failed.code) == (503, "out_of_memory")
    assert neighbour.text == after.text
    engine.check()


def test_an_answer_that_cannot_begin_in_time_is_an_error(engine: Engine) -> None:
    async def ask() -> Any:
        desk = Desk(engine)
        busy = [asyncio.create_task(desk.answer(prompt_of(engine, max_tokens=900))) for _ in range(2)]
        async with asyncio.timeout(PATIENCE_S):
            while engine.stats().running < 2:
                await asyncio.sleep(0.001)
        late = await desk.answer(prompt_of(engine, deadline_s=0.01))
        for task in busy:
            task.cancel()
        await free(engine)
        return late

    late = asyncio.run(ask())
    assert (late.status, late.code, late.retry_after_s) == (503, "deadline", 1)


def test_a_cut_answer_says_length_to_clients() -> None:
    assert [Reply("", 1, reason).api_finish_reason for reason in ("stop", "length", "deadline")] == [
        "stop",
        "length",
        "length",
    ]


def test_errors_survive_the_way_between_processes() -> None:
    error = ApiError(429, "later", "overloaded", "param", 7)
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.status, copy.body(), copy.headers()) == (429, error.body(), {"retry-after": "7"})
