"""Requests, steps and listeners that fail: each ends, alone where it can, and the batch goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from flashsloth import FlashSlothProcessor
from pipelines.serving import batch as batch_module
from pipelines.serving.answers import Chunk
from pipelines.serving.batch import ContinuousBatch
from pipelines.serving.prompts import Prompt
from pipelines.serving.tickets import Row, Ticket
from tests.batches import Sender, run
from tests.fixtures.tiny import build_processor
from tests.prompts import mixed_prompts, sampled


@pytest.fixture(scope="module")
def processor() -> FlashSlothProcessor:
    return build_processor()


def fail_on(batch: ContinuousBatch, monkeypatch: pytest.MonkeyPatch, guilty: Prompt, error: Exception) -> None:
    prefill = batch.decoder.prefill

    def failing(prompts: Sequence[Prompt], slot: int) -> torch.Tensor:
        logits = prefill(prompts, slot)
        if guilty in prompts:
            raise error
        return logits

    monkeypatch.setattr(batch.decoder, "prefill", failing)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory"), ValueError("no turn")])
def test_a_request_that_fails_in_its_prefill_fails_alone(
    processor: FlashSlothProcessor,
    build_batch: Callable[..., ContinuousBatch],
    monkeypatch: pytest.MonkeyPatch,
    error: Exception,
) -> None:
    prompts = mixed_prompts(processor)
    expected, batch = run(build_batch(), prompts), build_batch()
    fail_on(batch, monkeypatch, prompts[3], error)
    early = Sender(batch.submit(prompts[0]))
    batch.step()
    senders = [Sender(batch.submit(prompt)) for prompt in prompts[1:]]
    while batch.busy:
        batch.step()
    answers = [sender.answer for sender in [early, *senders]]
    assert answers[:3] + answers[4:] == expected[:3] + expected[4:]
    assert senders[2].chunks == [Chunk([], "", "error", f"{type(error).__name__}: {error}")]
    assert senders[2].ticket.failure is error
    assert error.__traceback__ is None  # its frames hold tensors
    monkeypatch.undo()
    assert run(batch, prompts) == expected


def test_a_request_that_cannot_become_a_row_fails_alone(
    processor: FlashSlothProcessor, build_batch: Callable[..., ContinuousBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = mixed_prompts(processor)
    expected, batch = run(build_batch(), prompts), build_batch(max_slots=4)

    def failing(ticket: Ticket, *rest: Any) -> Row:
        if ticket.prompt is prompts[3]:
            raise ValueError("no such seed")
        return Row(ticket, *rest)

    monkeypatch.setattr(batch_module, "Row", failing)
    senders = [Sender(batch.submit(prompt)) for prompt in prompts]
    while batch.busy:
        batch.step()
    assert senders[3].chunks == [Chunk([], "", "error", "ValueError: no such seed")]
    answers = [sender.answer for sender in senders]
    assert answers[:3] + answers[4:] == expected[:3] + expected[4:]


def test_a_step_that_fails_leaves_nobody_without_an_end(
    processor: FlashSlothProcessor, build_batch: Callable[..., ContinuousBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those too that are no longer waiting and have no row yet."""
    prompts = mixed_prompts(processor)
    expected, batch, lost = run(build_batch(), prompts), build_batch(max_slots=4), RuntimeError("lost")
    early = Sender(batch.submit(sampled(prompts[0], max_tokens=50)))
    batch.step()
    senders = [early, *(Sender(batch.submit(prompt)) for prompt in prompts)]

    def failing(group: Sequence[Ticket]) -> None:
        assert len(group) == 3
        raise lost

    monkeypatch.setattr(batch, "_prefill", failing)
    with pytest.raises(RuntimeError, match="lost"):
        batch.step()
    batch.fail_all(lost)
    assert [sender.chunks[-1].error for sender in senders] == ["RuntimeError: lost"] * 9
    assert not batch.busy
    monkeypatch.undo()
    assert run(batch, prompts) == expected


def test_out_of_memory_in_a_decode_step_ends_the_newest_request_and_nobody_loses_a_token(
    processor: FlashSlothProcessor, build_batch: Callable[..., ContinuousBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [sampled(p, temperature=0.8, seed=3) for p in mixed_prompts(processor)]
    expected, batch = run(build_batch(), prompts), build_batch(max_slots=3)
    decode = batch.decoder.decode

    def failing(tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        logits = decode(tokens, positions)
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("three are too many")
        return logits

    monkeypatch.setattr(batch.decoder, "decode", failing)
    senders = [Sender(batch.submit(prompt)) for prompt in prompts[:4]]
    batch.step()
    batch.step()
    assert senders[2].answer.finish_reason == "error"
    monkeypatch.undo()
    while batch.busy:
        batch.step()
    answers = [sender.answer for sender in senders]
    assert answers[:2] == expected[:2]
    assert answers[3] == expected[3] or answers[3].finish_reason == "error"


def test_any_other_failure_of_a_decode_step_ends_those_that_run_and_the_batch_goes_on(
    processor: FlashSlothProcessor, build_batch: Callable[..., ContinuousBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, batch = mixed_prompts(processor), build_batch()
    senders = [Sender(batch.submit(prompt)) for prompt in prompts]

    def failing(*_: Any) -> torch.Tensor:
        raise RuntimeError("device lost")

    monkeypatch.setattr(batch.decoder, "decode", failing)
    batch.step()
    assert {sender.chunks[-1].error for sender in senders} == {"RuntimeError: device lost"}
    monkeypatch.undo()
    assert run(batch, prompts) == run(build_batch(), prompts)


@pytest.mark.parametrize("ending", ["length", "cancelled"])
def test_a_slot_that_cannot_be_moved_leaves_nobody_without_an_end(
    processor: FlashSlothProcessor,
    build_batch: Callable[..., ContinuousBatch],
    monkeypatch: pytest.MonkeyPatch,
    ending: str,
) -> None:
    """Neither the one that ends, nor the one of the last slot that should have taken its place."""
    prompts, batch = mixed_prompts(processor), build_batch()
    first, *others = prompts
    senders = [Sender(batch.submit(sampled(first, max_tokens=12 if ending == "length" else 50)))]
    senders += [Sender(batch.submit(sampled(prompt, max_tokens=50))) for prompt in others]
    while batch.stats().waiting:
        batch.step()
    lost = RuntimeError("device lost")

    def failing(*_: Any) -> None:
        raise lost

    monkeypatch.setattr(batch.slots, "move", failing)
    if ending == "cancelled":
        senders[0].ticket.cancel()
    with pytest.raises(RuntimeError, match="device lost"):
        for _ in range(12):
            batch.step()
    batch.fail_all(lost)
    ends = [[chunk.error for chunk in sender.chunks if chunk.finish_reason] for sender in senders]
    assert ends == [["RuntimeError: device lost"]] * 8
    assert not batch.busy
    monkeypatch.undo()
    assert run(batch, prompts) == run(build_batch(), prompts)


def test_numbers_that_are_none_end_their_row_and_leave_nothing_in_its_slot(
    processor: FlashSlothProcessor, build_batch: Callable[..., ContinuousBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = mixed_prompts(processor)
    expected, batch = run(build_batch(), prompts), build_batch()
    senders = [Sender(batch.submit(prompt)) for prompt in prompts]
    while batch.stats().waiting:
        batch.step()
    batch.slots.states[:, :, 7, :, :5] = torch.nan  # the last one, into which nothing moves
    while batch.busy:
        batch.step()
    assert senders[7].chunks[-1].error == "RuntimeError: the model gives logits that are not finite"
    assert [sender.answer for sender in senders[:7]] == expected[:7]
    assert bool(batch.slots.states.isfinite().all())
    assert run(batch, prompts) == expected


def test_a_listener_that_fails_costs_its_own_request_only(
    processor: FlashSlothProcessor, build_batch: Callable[..., ContinuousBatch], caplog: pytest.LogCaptureFixture
) -> None:
    prompts, batch = mixed_prompts(processor), build_batch()
    calls = []

    def failing(chunk: Chunk) -> None:
        calls.append(chunk)
        raise RuntimeError("Event loop is closed")

    batch.submit(prompts[0]).set_listener(failing)
    other = Sender(batch.submit(prompts[1]))
    with caplog.at_level(logging.ERROR):
        while batch.busy:
            batch.step()
    assert len(calls) == 1
    assert "Event loop is closed" in caplog.text
    assert other.answer == run(build_batch(), prompts[1:2])[0]
