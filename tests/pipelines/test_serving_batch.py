"""The continuous batch, driven step by step: what a request gets does not depend on who joins and leaves beside it."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from flashsloth import FlashSlothProcessor
from pipelines.serving.answers import Answer, Chunk
from pipelines.serving.batch import ContinuousBatch, EngineFull
from pipelines.serving.engine_settings import EngineSettings
from pipelines.serving.prompts import Encoder, Prompt
from tests.batches import Sender, run
from tests.fixtures.tiny import build_processor, build_tiny_model
from tests.prompts import generate_alone, mixed_prompts, random_prompt, sampled


@pytest.fixture(scope="module")
def processor() -> FlashSlothProcessor:
    return build_processor()


@pytest.mark.parametrize("tiling", ["base", "hd"])
@pytest.mark.parametrize("seed", range(3))
def test_any_order_of_arrival_gives_the_tokens_of_one_by_one_generate(tiling: str, seed: int) -> None:
    source = random.Random(seed)
    processor = build_processor(tiling)
    model, twin, encoder = build_tiny_model(processor), build_tiny_model(processor), Encoder(processor)
    settings = EngineSettings(
        max_slots=source.randint(1, 6),
        prefill_tokens=source.choice([1, 100, 1000]),
        image_batch_size=source.randint(1, 3),
        image_cache_bytes=source.choice([0, 50_000, 10**6]),
    )
    batch = ContinuousBatch(model, processor, settings)
    coming = [random_prompt(encoder, source) for _ in range(24)]
    expected = [generate_alone(twin, processor, prompt) for prompt in coming]
    senders: list[Sender] = []
    cancelled: set[int] = set()
    while len(senders) < len(coming) or batch.busy:
        for prompt in coming[len(senders) :][: source.choice([0, 0, 1, 2, 5])]:
            senders.append(Sender(batch.submit(prompt)))
        if senders and source.random() < 0.1:
            place = source.randrange(len(senders))
            if not senders[place].ended:
                cancelled.add(place)
                senders[place].ticket.cancel()
        batch.step()
    for place, sender in enumerate(senders):
        if place in cancelled:
            assert sender.answer.finish_reason == "cancelled"
            assert expected[place][: len(sender.answer.token_ids)] == sender.answer.token_ids
        else:
            assert sender.answer.token_ids == expected[place], (place, settings)
    long_ones = [tuple(tokens[:6]) for tokens in expected if len(tokens) >= 6]
    assert len(set(long_ones)) > len(long_ones) / 2 > 3  # the prompts do lead to different answers
    assert len(cancelled) < len(coming) / 2
    assert batch.stats().running == batch.stats().waiting == 0


def test_a_seed_gives_the_same_draw_in_any_company(
    processor: FlashSlothProcessor, build_batch: Callable[..., ContinuousBatch]
) -> None:
    prompts = mixed_prompts(processor)
    guest = sampled(prompts[3], max_tokens=10, temperature=1.3, top_p=0.9, seed=7)
    (alone,) = run(build_batch(), [guest])
    for seed in range(4):
        source, batch = random.Random(seed), build_batch(max_slots=4)
        others = [sampled(p, temperature=source.choice([0, 0.7]), top_p=source.choice([1, 0.8])) for p in prompts]
        for prompt in source.sample(others, 3):
            batch.submit(prompt)
        for _ in range(source.randint(0, 4)):
            batch.step()
        late = Sender(batch.submit(guest))
        for prompt in source.sample(others, 3):
            batch.submit(prompt)
        while batch.busy:
            batch.step()
        assert late.answer == alone
    assert run(build_batch(), [sampled(guest, seed=8)]) != [alone]


def test_a_cancelled_request_frees_its_slot_within_one_step(
    processor: FlashSlothProcessor, build_batch: Callable[..., ContinuousBatch]
) -> None:
    batch = build_batch(max_slots=2)
    prompts = mixed_prompts(processor, max_tokens=200)
    senders = [Sender(batch.submit(prompt)) for prompt in prompts[:3]]
    for _ in range(3):
        batch.step()
    assert (batch.stats().running, batch.stats().waiting) == (2, 1)
    senders[0].ticket.cancel()
    batch.step()
    assert senders[0].answer.finish_reason == "cancelled"
    assert (batch.stats().running, batch.stats().waiting) == (2, 0)  # the one that waited has the slot
    senders[1].ticket.cancel()
    senders[2].ticket.cancel()
    batch.step()
    assert not batch.busy


def test_a_cancelled_request_leaves_the_queue_without_a_slot(
    processor: FlashSlothProcessor, build_batch: Callable[..., ContinuousBatch]
) -> None:
    batch = build_batch(max_slots=1)
    first, second = (Sender(batch.submit(prompt)) for prompt in mixed_prompts(processor, max_tokens=50)[:2])
    batch.step()
    second.ticket.cancel()
    batch.step()
    assert second.chunks == [Chunk([], "", "cancelled")]
    assert not first.ended


def test_a_deadline_ends_an_answer_where_it_is_and_a_request_that_still_waits(
    processor: FlashSlothProcessor, build_batch: Callable[..., ContinuousBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    batch = build_batch(max_slots=1)
    prompt = mixed_prompts(processor, max_tokens=50)[0]
    running = Sender(batch.submit(sampled(prompt, deadline_s=5.0)))
    waiting = Sender(batch.submit(sampled(prompt, deadline_s=4.0)))
    for _ in range(3):
        batch.step()
    clock[0] = 104.0
    batch.step()
    assert waiting.answer == Answer([], "", "deadline")
    assert not running.ended
    clock[0] = 105.0
    batch.step()
    assert running.answer.finish_reason == "deadline"
    assert len(running.answer.token_ids) == 5  # one of the prefill, one of each step
    assert not batch.busy


def test_waiting_prompts_do_not_stall_those_that_run(
    processor: FlashSlothProcessor, build_batch: Callable[..., ContinuousBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two decode steps, no more is read than the budgets say, and every step decodes."""
    batch = build_batch(max_slots=16, prefill_tokens=250, image_batch_size=2)
    encoder, source = Encoder(processor), random.Random(0)
    groups: list[Sequence[Prompt]] = []
    prefill = batch.decoder.prefill
    monkeypatch.setattr(
        batch.decoder, "prefill", lambda prompts, slot: groups.append(prompts) or prefill(prompts, slot)
    )
    running = Sender(batch.submit(sampled(mixed_prompts(processor)[0], max_tokens=100)))
    batch.step()
    for _ in range(15):
        batch.submit(sampled(random_prompt(encoder, source), max_tokens=100))
    steps = 0
    while batch.stats().waiting:
        groups.clear()
        tokens = batch.stats().generated_tokens
        rows = batch.stats().running
        batch.step()
        steps += 1
        (group,) = groups
        assert len(group) * max(len(prompt.input_ids) for prompt in group) <= 250
        assert len({prompt.image_key for prompt in group} - {None}) <= 2
        assert batch.stats().generated_tokens == tokens + rows + 2 * len(group)
    assert 4 < steps < 15
    assert not running.ended


def test_images_are_encoded_once_for_all_who_ask_about_them(
    processor: FlashSlothProcessor, build_batch: Callable[..., ContinuousBatch]
) -> None:
    batch = build_batch()
    prompts = mixed_prompts(processor)
    together = run(batch, prompts)
    assert (batch.stats().images_encoded, batch.stats().image_cache_hits) == (4, 1)
    assert run(batch, prompts) == together
    assert (batch.stats().images_encoded, batch.stats().image_cache_hits) == (4, 6)
    assert batch.stats().prefill_tokens == 2 * sum(len(prompt.input_ids) for prompt in prompts)


def test_a_full_queue_refuses(processor: FlashSlothProcessor, build_batch: Callable[..., ContinuousBatch]) -> None:
    """Slots that are free count: as many may come at once as find one, and `max_waiting` more."""
    batch = build_batch(max_slots=3, max_waiting=2)
    prompts = [sampled(prompt, max_tokens=20) for prompt in mixed_prompts(processor)]
    for prompt in prompts[:5]:
        assert batch.has_room()
        batch.submit(prompt)
    for _ in range(5):  # however far the first three are
        with pytest.raises(EngineFull, match="2 requests wait for a slot, as many as may"):
            batch.submit(prompts[5])
        batch.step()
    while not batch.has_room():  # until one has its answer
        batch.step()
    batch.submit(prompts[5])


def test_room_is_not_looked_for_while_a_request_is_between_the_queue_and_a_slot(
    build_batch: Callable[..., ContinuousBatch],
) -> None:
    """Whoever waits for room would see some that is none, and be refused in place of waiting on."""
    batch = build_batch(max_slots=1, max_waiting=1)
    found: list[bool] = []
    looking = threading.Thread(target=lambda: found.append(batch.has_room()))
    with batch._lock:
        looking.start()
        looking.join(0.2)
        assert looking.is_alive()
    looking.join(10)
    assert found == [True]


def spoiled(prompt: Prompt, what: str) -> Prompt:
    pixels = prompt.pixel_values
    assert pixels is not None
    changes: dict[str, dict[str, Any]] = {
        "no image": {"pixel_values": None, "image_key": None},
        "float pixels": {"pixel_values": pixels.astype(np.float32)},
        "two tiles": {"pixel_values": np.concatenate([pixels, pixels])},
        "no tokens": {"input_ids": [], "question_ids": []},
        "short questions": {"question_ids": prompt.question_ids[1:]},
        "cut": {"input_ids": prompt.input_ids[:-8], "question_ids": prompt.question_ids[:-8]},
        "unknown token": {"input_ids": [10**6, *prompt.input_ids[1:]]},
        "negative token": {"input_ids": [-1, *prompt.input_ids[1:]]},
        "too long": {"sampling": replace(prompt.sampling, max_tokens=1000)},
    }
    return replace(prompt, **changes[what])


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no image", "9 image placeholders stand in input_ids, the image gives 0"),
        ("float pixels", r"float32\[1, 3, 126, 126\], this model takes uint8\[1, 3, 126, 126\]"),
        ("two tiles", r"uint8\[2, 3, 126, 126\]"),
        ("no tokens", "0 input_ids and 0 question_ids"),
        ("short questions", r"\d+ input_ids and \d+ question_ids"),
        ("cut", "query tokens are no whole number of turns of 9"),
        ("unknown token", "1000000 stands in input_ids; the model's vocabulary has 512 tokens"),
        ("negative token", "-1 stands in input_ids"),
        ("too long", r"up to 1000 answer tokens are 10\d\d, a slot holds 1024"),
    ],
)
def test_a_prompt_that_can_never_be_answered_is_refused(
    processor: FlashSlothProcessor, build_batch: Callable[..., ContinuousBatch], what: str, message: str
) -> None:
    batch = build_batch()
    with pytest.raises(ValueError, match=message):
        batch.submit(spoiled(mixed_prompts(processor)[0], what))
    assert not batch.busy


def test_a_missing_image_is_not_made_up_for_by_somebody_elses(
    processor: FlashSlothProcessor, build_batch: Callable[..., ContinuousBatch]
) -> None:
    """In one batch their numbers would match, and one would read the other's picture."""
    batch, prompts = build_batch(), mixed_prompts(processor)
    surplus = replace(prompts[1], pixel_values=prompts[0].pixel_values)
    with pytest.raises(ValueError, match="0 image placeholders stand in input_ids, the image gives 9"):
        batch.submit(surplus)


def test_a_prompt_that_just_fits_is_answered(
    processor: FlashSlothProcessor, build_batch: Callable[..., ContinuousBatch]
) -> None:
    prompt = mixed_prompts(processor)[0]
    longest = len(prompt.input_ids) + 40
    (answer,) = run(build_batch(max_length=longest), [sampled(prompt, max_tokens=40)])
    assert len(answer.token_ids) == 40
    with pytest.raises(ValueError, match=f"a slot holds {longest}"):
        build_batch(max_length=longest).submit(sampled(prompt, max_tokens=41))


def test_an_answer_that_shrinks_has_what_its_prompt_leaves_of_a_slot(
    processor: FlashSlothProcessor, build_batch: Callable[..., ContinuousBatch]
) -> None:
    """And is the beginning of the one that a larger slot would have held."""
    prompt = mixed_prompts(processor)[0]
    room = len(prompt.input_ids) + 40
    asked = sampled(prompt, max_tokens=50, shrinks=True)
    (cut,), (whole,) = run(build_batch(max_length=room), [asked]), run(build_batch(), [asked])
    assert (len(cut.token_ids), cut.finish_reason, len(whole.token_ids)) == (40, "length", 50)
    assert cut.token_ids == whole.token_ids[:40]
    batch = build_batch(max_length=len(prompt.input_ids))
    with pytest.raises(ValueError, match=r"leave no room for an answer in a slot, which holds \d+: shorten the prompt"):
        batch.submit(asked)
