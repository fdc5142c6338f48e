"""Phi with one layer exchanged: PhiModel hands unknown keyword arguments to its layers, so nothing is copied."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PhiConfig, PhiModel
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.phi.modeling_phi import PhiDecoderLayer

from .attention import IMPLEMENTATION, PackedSamples, prefer_own
from .configuration_flashsloth import FlashSlothConfig
from .embedded_query import EmbeddedQuery, QueryPlan


class FlashSlothQueryLayer(PhiDecoderLayer):
    """A Phi layer that lets the query tokens look at the image first."""

    def __init__(self, config: FlashSlothConfig, layer_idx: int):
        super().__init__(config.text_config, layer_idx)
        self.embedded_query = EmbeddedQuery(config)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *args: Any,
        query_plan: QueryPlan | None = None,
        patches: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """A Phi layer's forward; with a plan and `patches` float[N, T * P, V], EmbQ updates its input first."""
        if query_plan is not None and patches is not None:
            hidden_states = self.embedded_query(hidden_states, patches, query_plan)
        return super().forward(hidden_states, *args, **kwargs)


class FlashSlothTextModel(PhiModel):
    """The Phi of a FlashSloth: layer `query_layer` is a `FlashSlothQueryLayer`, all names of weights stay."""

    _no_split_modules = ["PhiDecoderLayer", "FlashSlothQueryLayer"]  # noqa: RUF012

    def __init__(self, config: PhiConfig, flashsloth: FlashSlothConfig):
        super().__init__(config)
        prefer_own(self.config)
        self.layers[flashsloth.query_layer] = FlashSlothQueryLayer(flashsloth, flashsloth.query_layer)
        if config.hidden_act == "gelu_new":
            for layer in self.layers:
                # The same function in one kernel; transformers spells it out in eight, on the widest tensor there is.
                layer.mlp.activation_fn = nn.GELU(approximate="tanh")
        self.post_init()

    def forward(
        self,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        sample_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Phi's forward, without a mask where `flashsloth.attention` needs none.

        Args:
            inputs_embeds: float[B, S, D].
            attention_mask: int64[B, S], 0 at padding on either side.
            position_ids: int64[B, S].
            sample_ids: int64[B, S], in packed rows the sample that a position belongs to.
            **kwargs: as for `PhiModel`, and what `FlashSlothQueryLayer` takes.
        """
        if self.config._attn_implementation == IMPLEMENTATION:
            if sample_ids is not None:
                kwargs["samples"] = PackedSamples.of(sample_ids)
                # Phi makes no mask where it finds one of four dimensions. This one nobody looks at.
                attention_mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=sample_ids.device)
            elif position_ids is None and _no_cache(kwargs) and _only_ends_padded(attention_mask):
                attention_mask = None  # causal attention looks at nothing that comes behind
        return super().forward(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, **kwargs
        )


def _no_cache(arguments: dict[str, Any]) -> bool:
    return arguments.get("use_cache") is False and arguments.get("past_key_values") is None


def _only_ends_padded(attention_mask: torch.Tensor | None) -> bool:
    """Whether there is a mask, int64[B, S], and all its padding lies on the right."""
    return attention_mask is not None and attention_mask.dim() == 2 and bool((attention_mask.diff(dim=1) <= 0).all())
