"""Keys and values of the requests that are decoded, in slots that are allocated once.

Shapes: L layers, N slots, H key and value heads, S positions of a slot, D width of a head.

The first n slots are the ones in use, so that what attention reads is a view, never a copy: whoever leaves is replaced
by the last one.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PhiConfig

from pipelines.serving.engine_settings import EngineSettings

CPU_BYTES = 4 * 2**30
GPU_SHARE = 0.6  # of what the weights leave; prefill, images and graphs take the rest


class Slots:
    """One slot holds the keys and values of one request, from position 0 on."""

    def __init__(
        self, config: PhiConfig, num_slots: int, length: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_slots = num_slots
        self.length = length
        shape = (2, config.num_hidden_layers, num_slots, *_head_shape(config, length))
        # Zeros, not whatever memory holds: masked positions weigh 0, but 0 times NaN is NaN.
        zeros = _huge_zeros if device.type == "cpu" else torch.zeros
        self.states: Tensor = zeros(shape, dtype=dtype, device=device)
        """[2, L, N, H, S, D], keys then values."""

    @classmethod
    def allocate(cls, config: PhiConfig, settings: EngineSettings, dtype: torch.dtype, device: torch.device) -> Slots:
        """As many slots as the settings want and their memory budget holds.

        Raises:
            ValueError: the budget holds none, or a slot would be longer than the model has positions.
        """
        positions = config.max_position_embeddings
        length = settings.max_length or positions
        if length > positions:
            raise ValueError(f"max_length is {length}, the model has {positions} positions")
        heads, _, width = _head_shape(config, length)
        slot_bytes = 2 * config.num_hidden_layers * heads * length * width * dtype.itemsize
        budget = settings.kv_cache_bytes or _default_budget(device)
        if budget < slot_bytes:
            raise ValueError(
                f"one slot of {length} positions takes {slot_bytes} bytes, kv_cache_bytes is {budget}: "
                "raise it or lower max_length"
            )
        return cls(config, min(settings.max_slots, budget // slot_bytes), length, dtype, device)

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another one."""
        self.states[:, :, target, :, :length] = self.states[:, :, source, :, :length]

    def clear(self, slot: int) -> None:
        """Zero a slot in which numbers may stand that are not finite."""
        self.states[:, :, slot] = 0


class Prefill:
    """Attention over whole prompts, padded on the right, which leaves their keys and values in the slots from one on.

    Padding needs no mask: nothing looks ahead, and what padding leaves in a slot is written over before it is read.
    """

    def __init__(self, slots: Slots, first_slot: int) -> None:
        self.slots = slots
        self.first_slot = first_slot

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """See `fused_phi.Attend`."""
        rows, _, length, _ = key.shape
        for part, states in enumerate((key, value)):
            self.slots.states[part, layer, self.first_slot : self.first_slot + rows, :, :length] = states
        return _attention(query, key, value, is_causal=True)


class DecodeStep:
    """Attention of one new token per row over the first slots.

    Args:
        slots: row i has slot i.
        positions: int64[n]: where the new token of each row goes.
        length: how many positions of the slots are read; more than every position.
    """

    def __init__(self, slots: Slots, positions: Tensor, length: int) -> None:
        self.slots = slots
        self.positions = positions
        self.length = length
        self._rows = torch.arange(len(positions), device=positions.device)
        beyond = torch.arange(length, device=positions.device) > positions[:, None]
        mask = torch.zeros(beyond.shape, dtype=slots.states.dtype, device=positions.device)
        self._mask = mask.masked_fill_(beyond, -torch.inf)[:, None, None]

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layer: int) -> Tensor:
        """See `fused_phi.Attend`."""
        n = len(self.positions)
        filled = []
        for part, states in enumerate((key, value)):
            table = self.slots.states[part, layer]
            table[self._rows, :, self.positions] = states[:, :, 0]
            filled.append(table[:n, :, : self.length])
        if query.device.type == "cpu" and query.dtype == torch.float32 and query.shape[1] == key.shape[1]:
            return _attention_of_one(query, filled[0], filled[1], self._mask)
        return _attention(query, filled[0], filled[1], attn_mask=self._mask)


def _attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=query.shape[1] != key.shape[1], **options)


def _attention_of_one(query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """Attention of one query per head, as batched products: a CPU decodes 16 rows 10 to 15 % faster so.

    The fused kernel of torch for a CPU is made for many queries, and starts anew for every row and head.
    """
    rows, heads, _, width = query.shape
    mask = mask.expand(rows, heads, 1, -1).flatten(0, 1)
    weights = torch.baddbmm(mask, query.flatten(0, 1), key.flatten(0, 1).transpose(1, 2), alpha=width**-0.5)
    return torch.bmm(weights.softmax(dim=-1), value.flatten(0, 1)).view(query.shape)


def _huge_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros in huge pages, for which numpy asks the kernel: decoding jumps between slots, and is 10 % faster so."""
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def _head_shape(config: PhiConfig, length: int) -> tuple[int, int, int]:
    return config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads


def _default_budget(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return int(GPU_SHARE * free)
