"""Slots for keys and values: how many there are, and what moves between them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from transformers import PhiConfig

from pipelines.serving.cuda_graphs import size_class
from pipelines.serving.engine_settings import EngineSettings
from pipelines.serving.slot_attention import DecodeStep, Prefill
from pipelines.serving.slots import Slots

CPU = torch.device("cpu")
CONFIG = PhiConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=3, max_position_embeddings=64)
SLOT_BYTES = 2 * 3 * 4 * 64 * 8 * 4  # keys and values, layers, heads, positions, width, float32


def allocate(**settings: int) -> Slots:
    return Slots.allocate(CONFIG, EngineSettings(**settings), torch.float32, CPU)


def test_the_budget_says_how_many_slots_there_are() -> None:
    assert allocate(kv_cache_bytes=SLOT_BYTES).num_slots == 1
    assert allocate(kv_cache_bytes=5 * SLOT_BYTES - 1).num_slots == 4
    slots = allocate(kv_cache_bytes=100 * SLOT_BYTES, max_slots=7)
    assert slots.num_slots == 7
    assert slots.states.nbytes == 7 * SLOT_BYTES
    assert allocate(kv_cache_bytes=SLOT_BYTES, max_length=16).num_slots == 4
    assert not slots.states.any()


def test_a_budget_below_one_slot_and_a_length_beyond_the_model_are_refused() -> None:
    with pytest.raises(ValueError, match=f"takes {SLOT_BYTES} bytes, kv_cache_bytes is {SLOT_BYTES - 1}"):
        allocate(kv_cache_bytes=SLOT_BYTES - 1)
    with pytest.raises(ValueError, match="max_length is 65, the model has 64 positions"):
        allocate(max_length=65)


@pytest.mark.parametrize(("num_keys", "dtype"), [(4, torch.float32), (2, torch.float32), (4, torch.bfloat16)])
@pytest.mark.parametrize("start", [0, 2])
def test_decoding_in_slots_is_attention_over_what_each_row_has(num_keys: int, dtype: torch.dtype, start: int) -> None:
    """Prompts of two lengths, padded, maybe begun already, then two tokens each, against attention without slots."""
    torch.manual_seed(0)
    config = PhiConfig(**(CONFIG.to_dict() | {"num_key_value_heads": num_keys}))
    slots = Slots.allocate(config, EngineSettings(max_slots=5), dtype, CPU)
    slots.states.normal_()  # what former requests left
    before = slots.states.clone()
    lengths, layer = [5, 3], 1
    query, key, value = torch.randn(2, 7, 4, 8), *torch.randn(2, 2, 7, num_keys, 8)
    heads = torch.cat((value, key, query), dim=2).to(dtype)

    def attended(row: int, at: list[int], seen: list[int]) -> torch.Tensor:
        """What the queries `at` find in the positions `seen`: float[len(at), H, D]."""
        value, key, query = heads[row].split([num_keys, num_keys, 4], dim=1)
        parts = [part.transpose(0, 1) for part in (query[at], key[seen], value[seen])]
        mask = torch.tensor(seen) <= torch.tensor(at)[:, None]
        return F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=num_keys < 4).transpose(0, 1)

    close = partial(torch.testing.assert_close, **({} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.03}))
    if start:
        Prefill(slots, 0)(heads[:, :start], layer)
    found = Prefill(slots, 0, start)(heads[:, start:5], layer)
    for row, length in enumerate(lengths):
        close(found[row, : length - start], attended(row, [*range(start, length)], [*range(length)]))
    for new in (5, 6):  # the place of the new token in `heads`
        positions = torch.tensor([length + new - 5 for length in lengths])
        found = DecodeStep(slots, positions, int(positions.max()) + 1)(heads[:, new : new + 1], layer)
        for row, length in enumerate(lengths):
            close(found[row], attended(row, [new], [*range(length), *range(5, new + 1)]))
    assert torch.equal(slots.states[:, [0, 2]], before[:, [0, 2]])  # the other layers
    assert torch.equal(slots.states[:, 1, 2:], before[:, 1, 2:])  # the other slots
    assert torch.equal(slots.states[:, 1, :, :, 7:], before[:, 1, :, :, 7:])  # the positions behind


def test_a_slot_moves_as_far_as_it_is_filled() -> None:
    slots = allocate(max_slots=3)
    slots.states.normal_()
    before = slots.states.clone()
    slots.move(2, 0, 10)
    assert torch.equal(slots.states[:, :, 0, :, :10], before[:, :, 2, :, :10])
    assert torch.equal(slots.states[:, :, 0, :, 10:], before[:, :, 0, :, 10:])
    assert torch.equal(slots.states[:, :, 1:], before[:, :, 1:])
    slots.clear(1)
    assert not slots.states[:, :, 1].any()


def test_size_classes_are_few_and_hold_the_step() -> None:
    config = PhiConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, max_position_embeddings=3000)
    slots = Slots.allocate(config, EngineSettings(max_slots=12), torch.float32, CPU)
    classes = set()
    for rows in range(1, 13):
        for length in range(1, 3001, 7):
            size = size_class(rows, length, slots)
            assert rows <= size[0] <= 12
            assert length <= size[1] <= 3000
            classes.add(size)
    assert {rows for rows, _ in classes} == {1, 2, 4, 8, 12}
    assert {length for _, length in classes} == {256, 512, 1024, 2048, 3000}
