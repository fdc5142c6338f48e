"""Keys and values of the requests that are decoded, in slots that are allocated once.

Shapes: L layers, N slots, H key and value heads, S positions of a slot, D width of a head.

The first n slots are the ones in use, so that what attention reads is a view, never a copy: whoever leaves is replaced
by the last one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import DynamicCache, PhiConfig

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
        self.states = torch.zeros(shape, dtype=dtype, device=device)
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

    def write(self, slot: int, cache: DynamicCache) -> None:
        """Fill slots from `slot` on with the rows of a prefill's cache."""
        for layer, entry in enumerate(cache.layers):
            for part, states in enumerate((entry.keys, entry.values)):
                rows, _, length, _ = states.shape
                self.states[part, layer, slot : slot + rows, :, :length] = states

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another one."""
        self.states[:, :, target, :, :length] = self.states[:, :, source, :, :length]

    def clear(self, slot: int) -> None:
        """Zero a slot in which numbers may stand that are not finite."""
        self.states[:, :, slot] = 0


@dataclass
class SlotStep:
    """What the layers of a Phi take for their cache in one decode step: the first n slots, as far as they are filled.

    Attributes:
        rows: int64[n], 0 to n - 1.
        positions: int64[n]: where the new token of each row goes.
        length: how many positions of the slots are read; more than every position.
    """

    slots: Slots
    rows: torch.Tensor
    positions: torch.Tensor
    length: int

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Write float[n, H, 1, D] of one layer; returns what there is to attend to, float[n, H, length, D]."""
        n = len(self.rows)
        filled = []
        for part, states in enumerate((keys, values)):
            table = self.slots.states[part, layer]
            table[self.rows, :, self.positions] = states[:, :, 0]
            filled.append(table[:n, :, : self.length])
        return filled[0], filled[1]

    def mask(self, dtype: torch.dtype) -> torch.Tensor:
        """0 at the positions that a row has, -inf beyond: dtype[n, 1, 1, length]."""
        beyond = torch.arange(self.length, device=self.positions.device) > self.positions[:, None]
        mask = torch.zeros(beyond.shape, dtype=dtype, device=beyond.device)
        return mask.masked_fill_(beyond, -torch.inf)[:, None, None]


def _head_shape(config: PhiConfig, length: int) -> tuple[int, int, int]:
    return config.num_key_value_heads, length, config.hidden_size // config.num_attention_heads


def _default_budget(device: torch.device) -> int:
    if device.type != "cuda":
        return CPU_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    return int(GPU_SHARE * free)
