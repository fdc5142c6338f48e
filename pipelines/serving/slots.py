"""Keys and values of the requests that are decoded, in slots that are allocated once.

Shapes: L layers, N slots, H key and value heads, S positions of a slot, D width of a head.

The first n slots are the ones in use, so that what attention reads is a view, never a copy: whoever leaves is replaced
by the last one.
"""

from __future__ import annotations

import math

import numpy as np
import torch
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
        self.num_heads: int = config.num_key_value_heads
        self.num_queries: int = config.num_attention_heads
        firsts = torch.arange(0, math.prod(shape[:-1]), length, device=device).view(shape[:-2])
        self._first_vectors = firsts.flip(0).permute(1, 2, 0, 3).flatten(2)

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

    @property
    def vectors(self) -> Tensor:
        """All keys and values, one a line: [2 * L * N * H * S, D]."""
        return self.states.view(-1, self.states.shape[-1])

    def places(self, positions: Tensor) -> tuple[Tensor, ...]:
        """Where `vectors` has the values and the keys of `positions` int64[n], one in each of the first slots.

        Returns:
            int64[n, H + H], for every layer; values, then keys.
        """
        return (self._first_vectors[:, : len(positions)] + positions[:, None]).unbind()

    def move(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another one."""
        self.states[:, :, target, :, :length] = self.states[:, :, source, :, :length]

    def clear(self, slot: int) -> None:
        """Zero a slot in which numbers may stand that are not finite."""
        self.states[:, :, slot] = 0


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
