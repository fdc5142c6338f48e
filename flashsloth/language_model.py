"""Phi with one layer exchanged: PhiModel hands unknown keyword arguments to its layers, so nothing is copied."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PhiConfig, PhiModel
from transformers.models.phi.modeling_phi import PhiDecoderLayer

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
        self.layers[flashsloth.query_layer] = FlashSlothQueryLayer(flashsloth, flashsloth.query_layer)
        self.post_init()
