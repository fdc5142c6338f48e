"""Attention that computes no score which nobody reads: samples packed into one line attend one by one.

transformers' `sdpa` attends over whole lines and masks what belongs to another sample. So a line of ten samples costs
what one sample of that length costs, ten times what the samples cost alone, and a mask keeps torch from its causal
kernels, which leave the upper half out. Here each sample is a causal call of its own, without a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

IMPLEMENTATION = "sdpa_by_sample"
"""The name under which transformers knows `attend`; one with "flash" in it would be taken for FlashAttention."""


@dataclass(frozen=True)
class PackedSamples:
    """Where the samples of packed rows end; not a bare list, of which torch.compile would compile every one anew."""

    lengths: list[list[int]]
    """For each row those of the samples that stand one behind the other."""

    @classmethod
    def of(cls, sample_ids: torch.Tensor) -> PackedSamples:
        """From the sample that each position belongs to, int64[B, S]."""
        return cls([row.unique_consecutive(return_counts=True)[1].tolist() for row in sample_ids])


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    samples: PackedSamples | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa`, over each sample alone where `samples` tell them apart.

    Args:
        module: the attention of a layer; its `is_causal` counts.
        query: float[B, H, S, D].
        key: float[B, K, S, D].
        value: float[B, K, S, D].
        attention_mask: bool[B, 1, S, S], not looked at where there are `samples`.
        samples: of packed rows, S positions in all in each.
        **kwargs: as for `sdpa`.

    Returns:
        float[B, S, H, D], and no weights.
    """
    if samples is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    return _attend_by_sample(module, query, key, value, samples, **kwargs), None


# Other lengths in every batch: compiled, it would be compiled anew each time.
@torch.compiler.disable
def _attend_by_sample(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    samples: PackedSamples,
    **kwargs: Any,
) -> torch.Tensor:
    # `split` and not slices: its backward pass joins the parts, where each slice's fills a whole tensor of zeros.
    rows = zip(*(states.split(1) for states in (query, key, value)), strict=True)
    found = []
    for row, lengths in zip(rows, samples.lengths, strict=True):
        parts = zip(*(states.split(lengths, dim=2) for states in row), strict=True)
        found.append(torch.cat([sdpa_attention_forward(module, *each, None, **kwargs)[0] for each in parts], dim=1))
    return torch.cat(found)


def prefer_own(config: PreTrainedConfig) -> None:
    """Let a model of this config attend by `attend` where it would by `sdpa`; another choice stays."""
    if config._attn_implementation == "sdpa":
        config._attn_implementation = IMPLEMENTATION


AttentionInterface.register(IMPLEMENTATION, attend)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)
