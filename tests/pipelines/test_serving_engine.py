"""The engine gives each row of a batch what it would get alone."""

from __future__ import annotations

import random
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from flashsloth.collation import collate
from flashsloth.conversation import ConversationError
from flashsloth.image_processing_flashsloth import normalize_pixels
from pipelines.serving.engine import Answer, Encoder, Engine, Prompt
from pipelines.serving.sampling import Sampling
from tests.fixtures.tiny import build_processor, build_tiny_model


def build_engine(tiling: str = "base") -> Engine:
    processor = build_processor(tiling)
    return Engine(build_tiny_model(processor), processor)


@pytest.fixture(scope="module")
def engine() -> Engine:
    return build_engine()


@pytest.fixture
def own_engine() -> Engine:
    """One whose weights a test may spoil."""
    return build_engine()


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8))


def conversation(*questions: str) -> list[dict[str, str]]:
    messages = []
    for question in questions:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes, a red one ."}]
    return messages[:-1]


def mixed_prompts(engine: Engine, max_tokens: int = 12) -> list[Prompt]:
    """Different lengths, with and without an image, one turn and several."""
    encoder = Encoder(engine.processor)
    asked = [
        (conversation("What color is the square?"), picture(0)),
        (conversation("Is there a blue triangle? Look at the left and at the right before you say so."), None),
        (conversation("Hi"), picture(1)),
        (conversation("How many circles?", "And where?", "Which color?"), picture(2)),
        (conversation("One?", "Two?"), None),
        (conversation("A red square above a green circle?"), picture(0)),
        (conversation("?"), None),
        (conversation("Is it on a grey background?", "Are you sure about the background?"), picture(3)),
    ]
    return [encoder.prompt(messages, image, Sampling(max_tokens=max_tokens)) for messages, image in asked]


def generate_alone(engine: Engine, prompt: Prompt) -> list[int]:
    """The slow twin: one prompt through `model.generate`, without padding."""
    sample = {"input_ids": prompt.input_ids, "question_ids": prompt.question_ids, "pixel_values": prompt.pixel_values}
    batch: dict[str, Any] = collate([sample], engine.processor.pad_token_id)
    if "pixel_values" in batch:
        batch["pixel_values"] = normalize_pixels(batch["pixel_values"])
    processor = engine.processor
    tokens = engine.model.generate(
        **batch,
        max_new_tokens=prompt.sampling.max_tokens,
        do_sample=False,
        eos_token_id=processor.eos_token_id,
        suppress_tokens=[processor.image_token_id, processor.query_token_id],
    )[0, len(prompt.input_ids) :].tolist()
    return tokens[:-1] if tokens[-1] == processor.eos_token_id else tokens


@pytest.mark.parametrize("tiling", ["base", "hd"])
def test_a_batch_gives_the_tokens_of_one_by_one_generate(tiling: str) -> None:
    engine = build_engine(tiling)
    prompts = mixed_prompts(engine)
    answers = engine.generate(prompts)
    assert [answer.token_ids for answer in answers] == [generate_alone(engine, prompt) for prompt in prompts]
    assert len({tuple(answer.token_ids) for answer in answers}) > 4  # the prompts do lead to different answers


def test_rows_end_independently(engine: Engine) -> None:
    longest = [answer.token_ids for answer in engine.generate(mixed_prompts(engine, max_tokens=12))]
    lengths = [1, 5, 3, 12, 2, 8, 7, 4]
    prompts = [
        Prompt(p.input_ids, p.question_ids, p.pixel_values, Sampling(max_tokens=length))
        for p, length in zip(mixed_prompts(engine), lengths, strict=True)
    ]
    answers = engine.generate(prompts)
    assert [answer.token_ids for answer in answers] == [
        row[:length] for row, length in zip(longest, lengths, strict=True)
    ]
    assert {answer.finish_reason for answer in answers} == {"length"}


def test_the_end_of_sequence_ends_a_row(own_engine: Engine) -> None:
    with torch.no_grad():
        own_engine.model.lm_head.bias[own_engine.processor.eos_token_id] = 1e4
    (answer,) = own_engine.generate(mixed_prompts(own_engine)[:1])
    assert (answer.token_ids, answer.text, answer.finish_reason) == ([], "", "stop")


def test_a_stop_text_ends_a_row_and_is_left_out(engine: Engine) -> None:
    prompts = mixed_prompts(engine, max_tokens=12)[:2]
    free = engine.generate(prompts)
    decode = engine.processor.tokenizer.decode
    stop = decode(free[0].token_ids[4:6])
    assert stop
    sampling = Sampling(max_tokens=12, stop=("never to be seen", stop))
    first, second = engine.generate(
        [
            Prompt(p.input_ids, p.question_ids, p.pixel_values, s)
            for p, s in zip(prompts, [sampling, Sampling(12)], strict=True)
        ]
    )
    assert first.finish_reason == "stop"
    assert len(first.token_ids) <= 6
    assert stop not in first.text
    assert decode(free[0].token_ids).startswith(first.text)
    assert second == free[1]


def test_a_seed_gives_the_same_draw_in_any_company(engine: Engine) -> None:
    prompts = mixed_prompts(engine)
    drawn = Sampling(max_tokens=10, temperature=1.3, top_p=0.9, seed=7)
    guest = Prompt(prompts[3].input_ids, prompts[3].question_ids, prompts[3].pixel_values, drawn)
    (alone,) = engine.generate([guest])
    for seed in range(3):
        company = random.Random(seed).sample(prompts, 4)
        assert engine.generate([*company, guest])[-1] == alone
    other = Prompt(guest.input_ids, guest.question_ids, guest.pixel_values, Sampling(10, 1.3, 0.9, (), 8))
    assert engine.generate([other])[0] != alone


def test_a_nucleus_of_one_token_is_greedy(engine: Engine) -> None:
    prompt = mixed_prompts(engine)[0]
    (greedy,) = engine.generate([prompt])
    drawn = Sampling(max_tokens=12, temperature=1.0, top_p=1e-9)
    (nucleus,) = engine.generate([Prompt(prompt.input_ids, prompt.question_ids, prompt.pixel_values, drawn)])
    assert nucleus == greedy


def test_placeholders_are_never_generated(own_engine: Engine) -> None:
    """Fed back, they would ask for an image that nobody gave."""
    forbidden = {own_engine.processor.image_token_id, own_engine.processor.query_token_id}
    with torch.no_grad():
        own_engine.model.lm_head.bias[list(forbidden)] = 1e4
    for answer in own_engine.generate(mixed_prompts(own_engine, max_tokens=3)):
        assert not forbidden & set(answer.token_ids)


def test_a_prompt_whose_image_is_missing_is_refused(engine: Engine) -> None:
    prompt = mixed_prompts(engine)[0]
    with pytest.raises(ValueError, match="9 image placeholders"):
        engine.generate([Prompt(prompt.input_ids, prompt.question_ids)])


def test_nothing_gives_nothing(engine: Engine) -> None:
    assert engine.generate([]) == []


@pytest.mark.parametrize("wrong", [{"max_tokens": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_sampling_refuses_what_makes_no_sense(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_the_health_check_notices_a_broken_model(own_engine: Engine) -> None:
    own_engine.check()
    with torch.no_grad():
        own_engine.model.lm_head.bias.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="not finite"):
        own_engine.check()


def test_the_health_check_notices_a_run_that_hangs(own_engine: Engine) -> None:
    stuck, release = threading.Event(), threading.Event()

    def hang(*_: Any) -> None:
        stuck.set()
        assert release.wait(30)

    handle = own_engine.model.lm_head.register_forward_pre_hook(hang)
    ticket = own_engine.submit(mixed_prompts(own_engine)[0])
    assert stuck.wait(30)
    own_engine.check()  # not for long yet
    with pytest.raises(RuntimeError, match="no decode step in 0 s, at most 0"):
        own_engine.check(patience_s=0.0)
    handle.remove()
    release.set()
    assert Answer.join(own_engine.stream(ticket)).finish_reason == "length"
    own_engine.check()


def test_the_encoder_serves_many_threads(engine: Engine) -> None:
    encoder = Encoder(engine.processor)
    questions = [f"Is there a triangle at place {i}, or a circle?" for i in range(64)]
    alone = [encoder.prompt(conversation(question)).input_ids for question in questions]
    with ThreadPoolExecutor(8) as pool:
        together = pool.map(lambda question: encoder.prompt(conversation(question)).input_ids, questions)
    assert list(together) == alone


def test_a_conversation_must_end_with_a_question(engine: Engine) -> None:
    messages = [*conversation("What is it?"), {"role": "assistant", "content": "A square."}]
    with pytest.raises(ConversationError, match="the last message is the assistant's"):
        Encoder(engine.processor).prompt(messages)
