"""What makes tokens of an image, but for pooling: the tower, and the projector into the language model's width."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel
from transformers.models.siglip.modeling_siglip import SiglipAttention

from .configuration_flashsloth import FlashSlothConfig


class FlashSlothVisionAttention(SiglipAttention):
    """SigLIP's attention, which takes no image at all too."""

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """float[N, P, V] to float[N, P, V]."""
        if len(hidden_states):
            return super().forward(hidden_states, attention_mask, **kwargs)
        # transformers cannot reshape what is empty, and fused kernels refuse it. What counts is that all are called.
        query, key, value = (each(hidden_states) for each in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(query + key + value), None


class FlashSlothVisionTower(SiglipVisionModel):
    """SigLIP read before its last norm: what comes out is the output of the last layer that runs.

    Of no image it makes no patches, at no cost: all its modules are called, with empty tensors. So where ranks meet in
    them, ZeRO-3 for their weights and every stage for their gradients, one without an image keeps in step with others.
    """

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(config)
        for layer in self.encoder.layers:
            layer.self_attn.__class__ = FlashSlothVisionAttention  # a new one would draw its weights again
        # Never applied in FlashSloth; kept as a parameter it would be reported missing and starve data parallelism.
        self.post_layernorm = nn.Identity()


class FlashSlothProjector(nn.Module):
    """The released `mlp2x_gelu`: from vision width to text width."""

    def __init__(self, config: FlashSlothConfig):
        super().__init__()
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.act = nn.GELU()
        self.linear_2 = nn.Linear(config.text_config.hidden_size, config.text_config.hidden_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """float[N, R, V] to float[N, R, D]."""
        return self.linear_2(self.act(self.linear_1(tokens)))
