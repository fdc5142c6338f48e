"""The operations that a log line counts are those that torch counts while it computes."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flashsloth.collation import collate
from flashsloth.image_processing_flashsloth import normalize_pixels
from pipelines.training.flops import FlopCounter
from pipelines.training.optimization import freeze
from tests.fixtures.tiny import build_processor, build_tiny_model
from tests.prepared import coloured_rows

ALL = ["vision_tower", "pooling", "projector", "query_tokens", "embedded_query", "language_model"]


def batch(processor, rows):
    """One row, so that there is no padding."""
    samples = []
    for row in rows:
        sample = dict(processor.encode(row["messages"], row["picture"] is not None, layout="chat"))
        if row["picture"] is not None:
            sample["pixel_values"] = processor.image_processor.to_uint8(row["picture"])
        samples.append(sample)
    inputs = collate(samples, processor.pad_token_id)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = normalize_pixels(inputs["pixel_values"])
    return inputs


@pytest.mark.parametrize("tiling", ["base", "hd"])
@pytest.mark.parametrize(
    "parts",
    [[], ALL, ALL[1:], ["pooling", "projector"]],
    ids=["forward", "instruct-hd", "instruct", "align"],
)
def test_operations_are_those_that_torch_counts(tiling, parts):
    processor = build_processor(tiling)
    model = build_tiny_model(processor)
    model.set_attn_implementation("eager")
    freeze(model, parts)
    inputs = batch(processor, coloured_rows(1, turns=2))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(**inputs, use_cache=False).loss
        if parts:
            loss.backward()
    counted = FlopCounter(model.config, parts).count(inputs)
    assert sum(counted) == pytest.approx(counter.get_total_flops(), rel=1e-12)


def test_a_text_only_sample_needs_no_vision_and_packing_changes_nothing():
    processor = build_processor()
    model = build_tiny_model(processor)
    inputs = batch(processor, coloured_rows(3, text_only_every=3)[2:])
    counter = FlopCounter(model.config, ALL)
    alone = counter.count(inputs)
    assert alone.vision == 0 and alone.language > 0
    length = inputs["input_ids"].shape[1]
    packed = {
        "input_ids": torch.cat([inputs["input_ids"].repeat(1, 2), torch.full((1, 3), processor.pad_token_id)], dim=1),
        "position_ids": torch.cat([torch.arange(length).repeat(2), torch.arange(3)])[None],
    }
    assert counter.count(packed) == (0, 2 * alone.language)
