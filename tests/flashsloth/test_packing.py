"""Several samples in one row: losses and gradients are those of the samples on rows of their own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.attention import IMPLEMENTATION
from flashsloth.collation import collate, collate_packed
from flashsloth.placeholders import number_samples
from tests.fixtures.tiny import build_processor, build_tiny_model

CONVERSATIONS = [
    (True, ["What color is the square?", "red .", "Is there a blue triangle on the left?", "Yes"]),
    (False, ["Is there a blue triangle?", "Yes, on the left ."]),
    (True, ["How many circles are there?", "two ."]),
    (True, ["a", "b", "c", "d", "What color is the circle on the grey background?", "green"]),
    (False, ["What color is the square?", "It is green .", "How many circles are there?", "two"]),
    (True, ["What color is the square above the green circle on the left?", "red ."]),
]
# A text row between two images, which must not read the one before it; an image alone; text alone.
LINES = [[0, 1, 2], [3], [4], [5, 0, 3, 4]]


@pytest.fixture(scope="module", params=["base", "hd"])
def processor(request: pytest.FixtureRequest) -> FlashSlothProcessor:
    return build_processor(request.param)


@pytest.fixture(params=[IMPLEMENTATION, "sdpa", "eager"])
def model(
    request: pytest.FixtureRequest, processor: FlashSlothProcessor
) -> Iterator[FlashSlothForConditionalGeneration]:
    model = build_tiny_model(processor)
    assert model.config.text_config._attn_implementation == IMPLEMENTATION
    model.set_attn_implementation(request.param)
    yield model


def samples_of(processor: FlashSlothProcessor) -> list[dict]:
    torch.manual_seed(1)
    samples = []
    for has_image, texts in CONVERSATIONS:
        messages = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]
        sample = processor.encode(messages, has_image)
        if has_image:
            sample["pixel_values"] = torch.randn(processor.image_processor.num_tiles, 3, 126, 126)
        samples.append(sample)
    return samples


def losses_and_gradients(model: FlashSlothForConditionalGeneration, batch: dict) -> tuple[torch.Tensor, dict]:
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    return output.loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


def test_losses_and_gradients_are_those_of_the_unpacked_samples(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor
) -> None:
    samples = samples_of(processor)
    packed = collate_packed([[samples[i] for i in line] for line in LINES], processor.pad_token_id)
    alone = collate([samples[i] for line in LINES for i in line], processor.pad_token_id)
    loss, gradients = losses_and_gradients(model, packed)
    expected_loss, expected = losses_and_gradients(model, alone)
    torch.testing.assert_close(loss, expected_loss, atol=1e-4, rtol=0)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, atol=1e-4, rtol=1e-4, msg=name)
    moved = {name for name, gradient in expected.items() if bool(gradient.any())}
    # A bias before a softmax has no gradient but rounding.
    assert {name for name in expected if not name.endswith(("k_proj.bias", "score_out.bias"))} <= moved


def test_every_logit_is_that_of_the_sample_alone(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor
) -> None:
    samples = samples_of(processor)
    with torch.no_grad():
        logits = model(**collate_packed([[samples[i] for i in line] for line in LINES], processor.pad_token_id)).logits
        for row, line in enumerate(LINES):
            start = 0
            for i in line:
                alone = model(**collate([samples[i]], processor.pad_token_id)).logits[0]
                torch.testing.assert_close(logits[row, start : start + len(alone)], alone, atol=1e-4, rtol=0)
                start += len(alone)


def test_without_the_kept_apart_positions_the_samples_would_mix(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor
) -> None:
    """Were packing only a matter of joining, this suite would pass without any of it."""
    samples = samples_of(processor)
    batch = collate_packed([[samples[1], samples[4]]], processor.pad_token_id)
    joined = {name: tensor for name, tensor in batch.items() if name != "position_ids"}
    with torch.no_grad():
        assert not torch.allclose(model(**batch).logits, model(**joined).logits, atol=1e-2)


def test_a_cache_is_refused_and_not_made(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor
) -> None:
    """With a cache, transformers would let the samples of a row attend to each other."""
    samples = samples_of(processor)
    batch = collate_packed([samples[:2]], processor.pad_token_id)
    assert model(**batch).past_key_values is None
    with pytest.raises(ValueError, match="several samples a row: with use_cache"):
        model(**batch, use_cache=True)


def test_a_turn_that_lost_query_tokens_is_named_in_a_packed_row_too(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor
) -> None:
    batch = collate_packed([samples_of(processor)[:3]], processor.pad_token_id)
    first = (batch["input_ids"][0] == processor.query_token_id).nonzero()[0, 0]
    batch["question_ids"][0, first] = 2
    with pytest.raises(ValueError, match=r"row 0, turn 2: 10 query tokens carry this turn .* takes 9"):
        model(**batch)


def test_positions_say_where_samples_begin() -> None:
    assert number_samples(torch.tensor([[0, 1, 2], [0, 1, 2]])) is None
    assert number_samples(torch.tensor([[5, 6, 7]])) is None
    numbers = number_samples(torch.tensor([[0, 1, 0, 0, 1], [0, 1, 2, 3, 0]]))
    assert numbers is not None and numbers.tolist() == [[0, 0, 1, 2, 2], [0, 0, 0, 0, 1]]


def rows(*lengths: int) -> list[dict]:
    return [{name: np.arange(n) + 1 for name in ("input_ids", "labels", "question_ids")} for n in lengths]


def test_a_packed_line_is_its_samples_one_behind_the_other() -> None:
    first, second, third = rows(3, 2, 1)
    batch = collate_packed([[first, second], [third]], pad_token_id=99)
    assert batch["input_ids"].tolist() == [[1, 2, 3, 1, 2], [1, 99, 99, 99, 99]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 2], [-100] * 5]  # nothing foresees a first token
    assert batch["question_ids"].tolist() == [[1, 2, 3, 1, 2], [1, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]
    assert "attention_mask" not in batch


@pytest.mark.parametrize(("lines", "message"), [([], "no samples"), ([rows(2), []], "line 1 of 2 holds no sample")])
def test_empty_lines_are_refused(lines: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        collate_packed(lines, pad_token_id=0)
