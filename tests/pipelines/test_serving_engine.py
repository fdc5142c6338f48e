"""The engine gives each row of a batch what it would get alone."""

from __future__ import annotations

import inspect
import random
import re
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import pipelines.serving.engine
from flashsloth.conversation import ConversationError
from pipelines.serving.engine import Answer, Chunk, Encoder, Engine, EngineFull, EngineSettings, Prompt
from pipelines.serving.sampling import Sampling
from tests.fixtures.tiny import build_processor, build_tiny_model
from tests.prompts import conversation, generate_alone, mixed_prompts, picture, sampled

PATIENCE_S = 30


def build_engine(tiling: str = "base", **settings: Any) -> Engine:
    processor = build_processor(tiling)
    return Engine(build_tiny_model(processor), processor, EngineSettings(**settings))


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with build_engine() as engine:
        yield engine


@pytest.fixture
def own_engine() -> Iterator[Engine]:
    """One whose weights a test may spoil, with a slot and a place to wait."""
    with build_engine(max_slots=1, max_waiting=1) as engine:
        yield engine


@pytest.mark.parametrize("tiling", ["base", "hd"])
def test_a_batch_gives_the_tokens_of_one_by_one_generate(tiling: str) -> None:
    with build_engine(tiling) as engine:
        prompts = mixed_prompts(engine.processor)
        answers = engine.generate(prompts)
    twin = build_tiny_model(engine.processor)
    assert [answer.token_ids for answer in answers] == [generate_alone(twin, engine.processor, p) for p in prompts]
    assert len({tuple(answer.token_ids) for answer in answers}) > 4  # the prompts do lead to different answers


def test_rows_end_independently(engine: Engine) -> None:
    longest = [answer.token_ids for answer in engine.generate(mixed_prompts(engine.processor, max_tokens=12))]
    lengths = [1, 5, 3, 12, 2, 8, 7, 4]
    prompts = [
        Prompt(p.input_ids, p.question_ids, p.pixel_values, Sampling(max_tokens=length))
        for p, length in zip(mixed_prompts(engine.processor), lengths, strict=True)
    ]
    answers = engine.generate(prompts)
    assert [answer.token_ids for answer in answers] == [
        row[:length] for row, length in zip(longest, lengths, strict=True)
    ]
    assert {answer.finish_reason for answer in answers} == {"length"}


def test_the_end_of_sequence_ends_a_row(own_engine: Engine) -> None:
    with torch.no_grad():
        own_engine.model.lm_head.bias[own_engine.processor.eos_token_id] = 1e4
    (answer,) = own_engine.generate(mixed_prompts(own_engine.processor)[:1])
    assert (answer.token_ids, answer.text, answer.finish_reason) == ([], "", "stop")


def test_a_stop_text_ends_a_row_and_is_left_out(engine: Engine) -> None:
    prompts = mixed_prompts(engine.processor, max_tokens=12)[:2]
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
    prompts = mixed_prompts(engine.processor)
    drawn = Sampling(max_tokens=10, temperature=1.3, top_p=0.9, seed=7)
    guest = Prompt(prompts[3].input_ids, prompts[3].question_ids, prompts[3].pixel_values, drawn)
    (alone,) = engine.generate([guest])
    for seed in range(3):
        company = random.Random(seed).sample(prompts, 4)
        assert engine.generate([*company, guest])[-1] == alone
    other = Prompt(guest.input_ids, guest.question_ids, guest.pixel_values, Sampling(10, 1.3, 0.9, (), 8))
    assert engine.generate([other])[0] != alone


def test_a_nucleus_of_one_token_is_greedy(engine: Engine) -> None:
    prompt = mixed_prompts(engine.processor)[0]
    (greedy,) = engine.generate([prompt])
    drawn = Sampling(max_tokens=12, temperature=1.0, top_p=1e-9)
    (nucleus,) = engine.generate([Prompt(prompt.input_ids, prompt.question_ids, prompt.pixel_values, drawn)])
    assert nucleus == greedy


def test_placeholders_are_never_generated(own_engine: Engine) -> None:
    """Fed back, they would ask for an image that nobody gave."""
    forbidden = {own_engine.processor.image_token_id, own_engine.processor.query_token_id}
    with torch.no_grad():
        own_engine.model.lm_head.bias[list(forbidden)] = 1e4
    for answer in own_engine.generate(mixed_prompts(own_engine.processor, max_tokens=3)):
        assert not forbidden & set(answer.token_ids)


def test_a_prompt_whose_image_is_missing_is_refused(engine: Engine) -> None:
    prompt = mixed_prompts(engine.processor)[0]
    with pytest.raises(ValueError, match="9 image placeholders"):
        engine.generate([Prompt(prompt.input_ids, prompt.question_ids)])


def test_nothing_gives_nothing(engine: Engine) -> None:
    assert engine.generate([]) == []


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
        assert release.wait(PATIENCE_S)

    handle = own_engine.model.lm_head.register_forward_pre_hook(hang)
    ticket = own_engine.submit(mixed_prompts(own_engine.processor)[0])
    assert stuck.wait(PATIENCE_S)
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


def test_what_is_no_conversation_or_no_picture_is_told_what_is(engine: Engine) -> None:
    encoder: Any = Encoder(engine.processor)
    for messages in ("What is it?", conversation("What is it?")[0], None):
        with pytest.raises(TypeError, match="messages is a list of turns"):
            encoder.prompt(messages)
    with pytest.raises(ConversationError, match="message 0 needs a role and a content"):
        encoder.prompt([{"content": "What is it?"}])
    for image in ("picture.png", b"bytes", [picture(0)]):
        with pytest.raises(TypeError, match=f"image is a {type(image).__name__}; give a PIL image"):
            encoder.prompt(conversation("What is it?"), image)


def test_what_is_no_prompt_is_told_how_to_make_one(engine: Engine) -> None:
    request: Any = {"messages": conversation("What is it?")}
    for misuse in (lambda: engine.stream(request), lambda: engine.submit(request), lambda: engine.generate([request])):
        with pytest.raises(TypeError, match="a request is a Prompt, not a dict: Encoder"):
            misuse()


def test_a_request_is_listened_to_once(engine: Engine) -> None:
    """A second listener would wait for ever for what the first one has got."""
    ticket = engine.submit(mixed_prompts(engine.processor)[0])
    assert list(engine.stream(ticket))[-1].finish_reason == "length"
    with pytest.raises(RuntimeError, match="submit its prompt once more"):
        engine.stream(ticket)


def test_the_example_runs(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], engine: Engine) -> None:
    example = re.search(r"\n\n((?:    .*\n)+)\n", inspect.getdoc(pipelines.serving.engine) or "")
    assert example is not None
    names = {"Engine": Engine, "Encoder": Encoder, "checkpoint": tiny_checkpoint, "image": picture(0)}
    exec(textwrap.dedent(example[1]), names)
    prompt = Encoder(engine.processor).prompt(conversation("What color is it?"), picture(0))
    assert capsys.readouterr().out == engine.generate([prompt])[0].text != ""


def test_a_stream_gives_the_answer_piece_by_piece(engine: Engine) -> None:
    prompt = mixed_prompts(engine.processor)[0]
    chunks = list(engine.stream(prompt))
    assert len(chunks) > 3
    assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert [Answer.join(chunks)] == engine.generate([prompt])


def test_streams_of_many_threads_do_not_mix(engine: Engine) -> None:
    prompts = mixed_prompts(engine.processor) * 4
    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(lambda prompt: Answer.join(engine.stream(prompt)), prompts))
    assert together == engine.generate(prompts)


def test_who_stops_listening_cancels(own_engine: Engine) -> None:
    endless, other = (sampled(p, max_tokens=900) for p in mixed_prompts(own_engine.processor)[:2])
    stream = own_engine.stream(endless)
    next(stream)
    stream.close()
    # There is one slot: the other one gets it only if the first one is gone.
    chunk = next(own_engine.stream(sampled(other, max_tokens=1)))
    assert chunk.finish_reason == "length"
    assert own_engine.stats().generated_tokens < 900


@pytest.mark.parametrize("is_closed", [True, False])
def test_who_never_listens_cancels_too(own_engine: Engine, is_closed: bool) -> None:
    endless, other = (sampled(p, max_tokens=900) for p in mixed_prompts(own_engine.processor)[:2])
    ticket = own_engine.submit(endless)
    stream = own_engine.stream(ticket)
    if is_closed:
        stream.close()
    else:
        del stream
    assert ticket.cancelled
    chunk = next(own_engine.stream(sampled(other, max_tokens=1)))
    assert chunk.finish_reason == "length"
    assert own_engine.stats().generated_tokens < 900


def test_a_listener_that_comes_late_gets_everything(engine: Engine) -> None:
    prompt = mixed_prompts(engine.processor)[0]
    ticket = engine.submit(prompt)
    (expected,) = engine.generate([prompt])  # by then the first is done, too, or about to be
    chunks: list[Chunk] = []
    ended = threading.Event()

    def listen(chunk: Chunk) -> None:
        chunks.append(chunk)
        if chunk.finish_reason:
            ended.set()

    ticket.set_listener(listen)
    assert ended.wait(PATIENCE_S)
    assert Answer.join(chunks) == expected


def test_a_full_engine_refuses_but_a_list_of_any_length_takes_its_turn(own_engine: Engine) -> None:
    prompts = mixed_prompts(own_engine.processor)
    tickets = []
    with pytest.raises(EngineFull):
        for prompt in prompts:
            tickets.append(own_engine.submit(sampled(prompt, max_tokens=900)))
    assert len(tickets) == 2  # one with the slot, one that waits
    for ticket in tickets:
        ticket.cancel()
    answers = own_engine.generate(prompts)
    assert [answer.finish_reason for answer in answers] == ["length"] * 8


def test_a_failure_reaches_the_caller_of_generate(own_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = mixed_prompts(own_engine.processor)
    encode = own_engine._batch.images.encode

    def failing(asked: list[Prompt]) -> Any:
        if prompts[2] in asked:
            raise torch.OutOfMemoryError("no memory")
        return encode(asked)

    monkeypatch.setattr(own_engine._batch.images, "encode", failing)
    with pytest.raises(torch.OutOfMemoryError, match="no memory") as caught:
        own_engine.generate(prompts[:4])
    assert caught.value.__notes__ == ["prompt 2 of 4"]
    (chunk,) = own_engine.stream(prompts[2])
    assert (chunk.finish_reason, chunk.error) == ("error", "OutOfMemoryError: no memory")
    monkeypatch.undo()
    assert own_engine.generate(prompts)[2].finish_reason == "length"


def test_closing_ends_what_is_under_way() -> None:
    engine = build_engine(max_slots=1)
    prompts = [sampled(p, max_tokens=900) for p in mixed_prompts(engine.processor)[:2]]
    streams = [engine.stream(prompt) for prompt in prompts]
    next(streams[0])
    engine.close()
    for stream in streams:
        *_, last = stream
        assert (last.finish_reason, last.error) == ("error", "RuntimeError: the engine is closed")
    with pytest.raises(RuntimeError, match="closed"):
        engine.submit(prompts[0])
    with pytest.raises(RuntimeError, match="closed"):
        engine.generate(prompts)
    with pytest.raises(RuntimeError, match="closed"):
        engine.check()
    engine.close()


def test_half_precision_runs() -> None:
    processor = build_processor()
    prompts = mixed_prompts(processor)
    with Engine(build_tiny_model(processor).bfloat16(), processor) as engine:
        assert engine._batch.slots.states.dtype == torch.bfloat16
        answers = engine.generate(prompts)
        assert [answer.finish_reason for answer in answers] == ["length"] * 8
        assert answers[0].token_ids[0] == generate_alone(engine.model.float(), processor, prompts[0])[0]


def test_an_engine_that_has_no_room_for_a_slot_says_so() -> None:
    with pytest.raises(ValueError, match=r"one slot of 1024 positions takes \d+ bytes, kv_cache_bytes is 1000"):
        build_engine(kv_cache_bytes=1000)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_graphs_give_the_tokens_of_eager_steps() -> None:
    processor = build_processor()
    prompts = mixed_prompts(processor)
    answers = []
    for graphs in (True, False):
        with Engine(build_tiny_model(processor).cuda(), processor, EngineSettings(cuda_graphs=graphs)) as engine:
            answers.append(engine.generate(prompts))
    assert answers[0] == answers[1]
