"""What prompts begin with is read once: its keys and values are copied, and the answers stay those of whole prompts."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flashsloth import FlashSlothProcessor
from pipelines.serving.decoder import Decoder
from pipelines.serving.engine import Engine, EngineSettings
from pipelines.serving.images import ImageStore
from pipelines.serving.prompts import Encoder, Prompt
from pipelines.serving.slots import Slots
from tests.fixtures.tiny import build_processor, build_tiny_model
from tests.prompts import conversation, generate_alone, mixed_prompts, picture


@pytest.fixture(scope="module")
def processor() -> FlashSlothProcessor:
    return build_processor()


def build_decoder(processor: FlashSlothProcessor) -> Decoder:
    model = build_tiny_model(processor)
    slots = Slots.allocate(model.config.text_config, EngineSettings(max_slots=4), torch.float32, torch.device("cpu"))
    return Decoder(model, slots, ImageStore(model, 0))


def lengths_read(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The positions that each later prefill runs through the layers."""
    lengths: list[int] = []
    phi = decoder._phi

    def count(embeds: torch.Tensor, *rest: object) -> torch.Tensor:
        lengths.append(embeds.shape[1])
        return phi(embeds, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(decoder, "_phi", count)
    monkeypatch.setattr(count, "phi", phi.phi, raising=False)
    return lengths


def opening(processor: FlashSlothProcessor, prompt: Prompt) -> int:
    """Tokens before the first question and the image."""
    tokens = zip(prompt.input_ids, prompt.question_ids, strict=True)
    closed = (turn or token == processor.image_token_id for token, turn in tokens)
    return next(place for place, is_closed in enumerate(closed) if is_closed)


@torch.inference_mode()
def test_a_known_opening_is_not_read_again(processor: FlashSlothProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = Encoder(processor)
    first, other = (encoder.prompt(conversation(text), picture(0)) for text in ("What?", "Is it a red square?"))
    text_only = encoder.prompt(conversation("What?"))
    decoder = build_decoder(processor)
    lengths = lengths_read(decoder, monkeypatch)
    alone = [build_decoder(processor).prefill([prompt], 0) for prompt in (first, other, text_only)]
    assert opening(processor, first) >= opening(processor, text_only) > 10

    whole = decoder.prefill([first], 3)
    together = decoder.prefill([other, text_only], 1)
    assert lengths == [len(first.input_ids), len(other.input_ids) - opening(processor, text_only)]
    assert torch.equal(whole, alone[0])
    torch.testing.assert_close(together, torch.cat(alone[1:]), atol=1e-5, rtol=1e-4)
    # What decoding will read is there, in each slot.
    fresh = build_decoder(processor)
    fresh.prefill([other], 0)
    read = slice(0, len(other.input_ids))
    torch.testing.assert_close(
        decoder.slots.states[:, :, 1, :, read], fresh.slots.states[:, :, 0, :, read], atol=1e-5, rtol=1e-4
    )


@torch.inference_mode()
def test_prompts_that_begin_otherwise_are_read_whole(
    processor: FlashSlothProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = Encoder(processor).prompt(conversation("What?"), picture(0))
    changed = [*prompt.input_ids[:5], prompt.input_ids[4], *prompt.input_ids[6:]]
    assert changed != prompt.input_ids
    other = replace(prompt, input_ids=changed)
    decoder = build_decoder(processor)
    lengths = lengths_read(decoder, monkeypatch)
    size, begun = len(prompt.input_ids), opening(processor, prompt)
    for asked, read in (
        ([prompt], size),
        ([prompt, other], size - 5),  # what both begin with
        ([other], size - 5),
        ([other], size - begun),  # kept now, in place of the first one's
        ([prompt], size - 5),
        ([prompt], size - begun),
    ):
        logits = decoder.prefill(asked, 0)
        assert lengths.pop() == read
        expected = torch.cat([build_decoder(processor).prefill([one], 0) for one in asked])
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_the_last_token_of_a_prompt_without_a_question_is_read(
    processor: FlashSlothProcessor, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = Prompt([5, 6, 7, 8], [0, 0, 0, 0])
    decoder = build_decoder(processor)
    lengths = lengths_read(decoder, monkeypatch)
    logits = [decoder.prefill([prompt], 0) for _ in range(2)]
    assert lengths == [4, 1]
    torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_an_opening_that_is_not_finite_is_not_kept(processor: FlashSlothProcessor) -> None:
    prompt = Encoder(processor).prompt(conversation("What?"))
    decoder = build_decoder(processor)
    bias = decoder._phi.layers[0].bias_in
    sound = bias.clone()
    bias.fill_(torch.nan)
    assert not decoder.prefill([prompt], 0).isfinite().any()
    bias.copy_(sound)
    expected = build_decoder(processor).prefill([prompt], 0)
    for _ in range(2):
        torch.testing.assert_close(decoder.prefill([prompt], 0), expected, atol=1e-5, rtol=1e-4)


def test_answers_are_those_of_whole_prompts_whatever_came_before(processor: FlashSlothProcessor) -> None:
    prompts = mixed_prompts(processor)
    strange = [replace(prompt, input_ids=[prompt.input_ids[1], *prompt.input_ids[1:]]) for prompt in prompts]
    twin = build_tiny_model(processor)
    with Engine(build_tiny_model(processor), processor, EngineSettings(max_slots=3)) as engine:
        for asked in (prompts, strange, [*prompts, *strange], [*strange[::2], *prompts, *strange[1::2]]):
            answers = engine.generate(asked)
            assert [answer.token_ids for answer in answers] == [
                generate_alone(twin, processor, prompt) for prompt in asked
            ]
