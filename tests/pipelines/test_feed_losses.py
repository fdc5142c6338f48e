"""However a global batch is dealt out, loss and gradients of the step are the same."""

from __future__ import annotations

import pytest
import torch

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.image_processing_flashsloth import normalize_pixels
from pipelines.feed import BatchLoader, Feed, Position, PreparedRows, TokenBudget
from tests.prepared import coloured_rows, write_prepared

MICRO_BATCHES = {
    "fixed": 2,
    "token budget": TokenBudget(400),
    "few images": TokenBudget(600, images=2),
    "packed": TokenBudget(300, line=300),
    "packed, few images": TokenBudget(400, images=2, line=200),
}


@pytest.fixture
def rows(tmp_path, processor) -> PreparedRows:
    conversations = coloured_rows(9, text_only_every=3) + coloured_rows(4, text_only_every=2, turns=3)
    return PreparedRows([write_prepared(tmp_path / "data", conversations, processor)])


def step(
    model: FlashSlothForConditionalGeneration,
    processor: FlashSlothProcessor,
    rows: PreparedRows,
    world_size: int,
    micro_batch: int | TokenBudget,
) -> tuple[float, dict[str, torch.Tensor], int]:
    """Loss and gradients of one optimizer step as data parallel training computes them: averages over ranks."""
    feed = Feed(rows.num_tokens, rows.num_loss_tokens, rows.has_image, global_batch=13, seed=0)
    model.zero_grad()
    loss, num_steps = 0.0, 0
    for rank in range(world_size):
        batches = feed.walk(Position(), 1)
        with BatchLoader(
            rows, batches, rank=rank, world_size=world_size, micro_batch=micro_batch, processor=processor, threads=2
        ) as loader:
            for micro in loader:
                micro.inputs["pixel_values"] = normalize_pixels(micro.inputs["pixel_values"])
                part = model(**micro.inputs, num_items_in_batch=micro.loss_tokens, use_cache=False).loss
                (part / world_size).backward()
                loss, num_steps = loss + part.item() / world_size, num_steps + 1
    return loss, {name: weight.grad.clone() for name, weight in model.named_parameters()}, num_steps


@pytest.mark.parametrize("micro_batch", MICRO_BATCHES.values(), ids=MICRO_BATCHES)
def test_loss_and_gradients_are_those_of_the_global_batch_in_one_piece(tiny_model, processor, rows, micro_batch):
    for module in tiny_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0  # it draws per micro-batch
    tiny_model.train()
    loss, gradients, _ = step(tiny_model, processor, rows, 1, 100)
    for world_size in (1, 3):
        other_loss, others, num_steps = step(tiny_model, processor, rows, world_size, micro_batch)
        assert num_steps > world_size
        assert other_loss == pytest.approx(loss, abs=1e-4)
        for name, gradient in gradients.items():
            torch.testing.assert_close(others[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def test_positions_and_tokens_of_a_micro_batch_are_counted(processor, rows):
    feed = Feed(rows.num_tokens, rows.num_loss_tokens, rows.has_image, global_batch=13, seed=0)
    for micro_batch in MICRO_BATCHES.values():
        batches = feed.walk(Position(), 1)
        with BatchLoader(rows, batches, rank=0, world_size=1, micro_batch=micro_batch, processor=processor) as loader:
            micro_batches = list(loader)
        assert sum(micro.num_tokens for micro in micro_batches) == rows.num_tokens.sum()
        for micro in micro_batches:
            mask = micro.inputs.get("attention_mask")
            real = mask.sum() if mask is not None else (micro.inputs["input_ids"] != processor.pad_token_id).sum()
            assert int(real) == micro.num_tokens <= micro.num_positions
