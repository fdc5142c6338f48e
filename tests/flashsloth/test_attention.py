"""Which attention runs: each packed sample alone, rows padded on the right without a mask, all others with one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor, attention
from flashsloth.collation import collate, collate_packed
from tests.fixtures.tiny import build_processor, build_tiny_model

TEXTS = [["Is there a blue triangle?", "Yes, on the left ."], ["a", "b", "How many circles are there?", "two ."]]


@pytest.fixture(scope="module")
def processor() -> FlashSlothProcessor:
    return build_processor()


@pytest.fixture
def samples(processor: FlashSlothProcessor) -> list[dict[str, Any]]:
    messages = [[{"role": ("user", "assistant")[n % 2], "content": t} for n, t in enumerate(each)] for each in TEXTS]
    return [processor.encode(each, has_image=False) for each in messages]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """Positions of each call of transformers' attention in the language model, and whether it got a mask."""
    found: list[tuple[int, bool]] = []
    whole = attention.sdpa_attention_forward

    def seen(module: Any, query: torch.Tensor, key: Any, value: Any, mask: Any, **rest: Any) -> Any:
        found.append((query.shape[2], mask is not None))
        return whole(module, query, key, value, mask, **rest)

    monkeypatch.setattr(attention, "sdpa_attention_forward", seen)
    return found


def test_packed_samples_attend_one_by_one(
    processor: FlashSlothProcessor, samples: list[dict[str, Any]], calls: list[tuple[int, bool]]
) -> None:
    model = build_tiny_model(processor)
    short, long = (len(sample["input_ids"]) for sample in samples)
    with torch.no_grad():
        model(**collate_packed([samples, samples[:1]], processor.pad_token_id))
    lines = [(short, False), (long, False), (short, False), (long, False)]  # in the second one, what is left is padding
    assert calls == lines * model.config.text_config.num_hidden_layers


@pytest.mark.parametrize(
    ("side", "arguments", "masked"),
    [
        ("right", {"use_cache": False}, False),
        ("left", {"use_cache": False}, True),
        ("right", {}, True),  # with a cache, later tokens come behind the padding
    ],
)
def test_only_padding_on_the_right_needs_no_mask_and_changes_no_logit(
    processor: FlashSlothProcessor,
    samples: list[dict[str, Any]],
    calls: list[tuple[int, bool]],
    side: str,
    arguments: dict[str, Any],
    masked: bool,
) -> None:
    model = build_tiny_model(processor)
    batch = collate(samples, processor.pad_token_id, padding_side=side)
    with torch.no_grad():
        logits = model(**batch, **arguments).logits
        assert {mask for _, mask in calls} == {masked}
        for row, sample in enumerate(samples):
            alone = model(**collate([sample], processor.pad_token_id)).logits[0]
            found = logits[row, batch["attention_mask"][row].bool()]
            torch.testing.assert_close(found, alone, atol=1e-4, rtol=0)


def test_in_training_the_head_runs_where_there_is_a_label(
    processor: FlashSlothProcessor, samples: list[dict[str, Any]]
) -> None:
    model: FlashSlothForConditionalGeneration = build_tiny_model(processor)
    batch = collate(samples, processor.pad_token_id)
    seen: list[int] = []
    model.lm_head.register_forward_hook(lambda module, given, out: seen.append(out.shape[:-1].numel()))
    whole = model(**batch)
    model.train()
    few = model(**batch)
    assert seen == [batch["input_ids"].numel(), int((batch["labels"] != -100).sum())]
    assert whole.logits is not None and few.logits is None
    torch.testing.assert_close(few.loss, whole.loss, atol=1e-6, rtol=0)
    torch.testing.assert_close(model(**batch, num_items_in_batch=2.0).loss, whole.loss * seen[1] / 2, atol=1e-5, rtol=0)
