"""The operations that a log line counts are those that torch counts while it computes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipelines.training.flops import FlopCounter
from pipelines.training.lora import add_adapters
from pipelines.training.model_settings import LoraSettings
from pipelines.training.optimization import freeze
from tests.fixtures.tiny import build_processor, build_tiny_model
from tests.prepared import coloured_rows, model_batch

ALL = ["vision_tower", "pooling", "projector", "query_tokens", "embedded_query", "language_model"]


@pytest.mark.parametrize("tiling", ["base", "hd"])
@pytest.mark.parametrize(
    ("parts", "lora"),
    [
        ([], None),
        (ALL, None),
        (ALL[1:], None),
        (["pooling", "projector"], None),
        (["embedded_query"], None),
        (["language_model"], None),
        (ALL[1:], {"rank": 3}),
        (["language_model"], {"rank": 2}),
        (["language_model"], {"rank": 2, "target_modules": ["k_proj", "fc1"]}),
        (["language_model", "embedded_query"], {"rank": 2, "target_modules": ["fc2"]}),
    ],
    ids=["forward", "hd", "instruct", "align", "query", "language", "instruct-lora", "lora", "lora-some", "lora-query"],
)
def test_operations_are_those_that_torch_counts(tiling, parts, lora):
    processor = build_processor(tiling)
    model = build_tiny_model(processor)
    model.set_attn_implementation("eager")
    settings = LoraSettings(**lora) if lora else None
    if settings:
        add_adapters(model, settings)
    freeze(model, parts)
    inputs = model_batch(processor, coloured_rows(1, turns=2))
    model.train()  # as it learns: the head at the labels alone
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(**inputs, use_cache=False).loss
        if parts:
            loss.backward()
    counted = FlopCounter(model.config, parts, lora=settings).count(inputs)
    assert sum(counted) == pytest.approx(counter.get_total_flops(), rel=1e-12)


def test_a_text_only_sample_needs_no_vision_and_packing_changes_nothing():
    processor = build_processor()
    model = build_tiny_model(processor)
    inputs = model_batch(processor, coloured_rows(3, text_only_every=3)[2:])
    counter = FlopCounter(model.config, ALL)
    alone = counter.count(inputs)
    assert alone.vision == 0 and alone.language > 0
    length = inputs["input_ids"].shape[1]
    packed = {
        "input_ids": torch.cat([inputs["input_ids"].repeat(1, 2), torch.full((1, 3), processor.pad_token_id)], dim=1),
        "position_ids": torch.cat([torch.arange(length).repeat(2), torch.arange(3)])[None],
        "labels": torch.cat([inputs["labels"].repeat(1, 2), torch.full((1, 3), -100)], dim=1),
    }
    assert counter.count(packed) == (0, 2 * alone.language)
