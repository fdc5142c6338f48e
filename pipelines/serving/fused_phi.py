"""Phi for inference: the same numbers from two matrix products a layer.

In Phi, attention and MLP read the same normed input, and their outputs are added (the parallel block of GPT-J). So the
projections to queries, keys, values and the inner MLP are one product, and the projections back are another one. A
decode step is bound by the number of its small operations, on a CPU and on a GPU: transformers' layer has about sixty,
this one fifteen. Its twin in the tests is transformers' layer itself.

Shapes: B rows, S positions, H heads, D width of a head, W width of the model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PhiModel

from flashsloth.embedded_query import QueryPlan
from pipelines.serving.fused_linear import activation_in_place, join_weights

Attend = Callable[[Tensor, int], Tensor]
"""The heads of the new positions, those of values, keys and queries side by side, float[B, S, heads, D], and the index
of the layer, to what the queries find, float[B, S, H, D]. Where older keys and values come from is its affair."""


class FusedPhi:
    """The layers of a Phi, ready to run. Its weights become views of the fused ones, so nothing is stored twice.

    Args:
        phi: of a FlashSloth, in evaluation mode; it goes on working.
    """

    def __init__(self, phi: PhiModel) -> None:
        self.phi = phi
        self.layers = [FusedLayer(layer, index) for index, layer in enumerate(phi.layers)]

    def __call__(
        self,
        embeds: Tensor,
        positions: Tensor,
        attend: Attend,
        query_plan: QueryPlan | None = None,
        patches: Tensor | None = None,
    ) -> Tensor:
        """Run all layers.

        Args:
            embeds: float[B, S, W].
            positions: int64[B, S] or int64[1, S].
            attend: the attention.
            query_plan: what EmbQ looks at, where there are images.
            patches: float[N, P, V], the images that it looks at.

        Returns:
            float[B, S, W], before the last norm.
        """
        cos, sin = self.phi.rotary_emb(embeds, positions)
        # The second half of a rotated vector turns with plus the first one, the first with minus the second.
        half = sin.shape[-1] // 2
        rotation = cos[:, :, None], torch.cat((-sin[..., :half], sin[..., half:]), dim=-1)[:, :, None]
        hidden = embeds
        for layer in self.layers:
            if query_plan is not None and layer.embedded_query is not None:
                hidden = layer.embedded_query(hidden, patches, query_plan)
            hidden = layer(hidden, rotation, attend)
        return hidden


class FusedLayer:
    """One layer."""

    def __init__(self, layer: Any, index: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.index = index
        self.norm = layer.input_layernorm
        self.embedded_query = getattr(layer, "embedded_query", None)
        self.head_norms = (attention.q_layernorm, attention.k_layernorm) if attention.qk_layernorm else None
        self.head_width = attention.head_dim
        self.num_keys = attention.config.num_key_value_heads
        self.num_queries = attention.config.num_attention_heads
        self.activate = activation_in_place(attention.config.hidden_act)
        inward = [attention.v_proj, attention.k_proj, attention.q_proj, mlp.fc1]
        outward = [attention.dense, mlp.fc2]
        self.weight_in, self.weight_out = join_weights(inward, dim=0), join_weights(outward, dim=1)
        self.bias_in = torch.cat([linear.bias.detach() for linear in inward])
        self.bias_out = attention.dense.bias.detach() + mlp.fc2.bias.detach()

    def __call__(self, hidden: Tensor, rotation: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """float[B, S, W] to float[B, S, W]; `rotation` holds cosines and signed sines, float[B, S, 1, rotated]."""
        queries, keys = self.num_queries, self.num_keys
        # [B * S, values | keys | queries | inner MLP]
        projected = F.linear(self.norm(hidden.flatten(0, 1)), self.weight_in, self.bias_in)
        split = (queries + 2 * keys) * self.head_width
        heads = projected[:, :split].view(*hidden.shape[:2], -1, self.head_width)
        query = heads[:, :, 2 * keys :]
        if self.head_norms is not None:
            for norm, part in zip(self.head_norms, (query, heads[:, :, keys : 2 * keys]), strict=True):
                part.copy_(norm(part))
        cos, sin = rotation
        turning = heads[:, :, keys:, : cos.shape[-1]]
        turning.copy_((turning * cos).addcmul_(turning.roll(cos.shape[-1] // 2, dims=-1), sin))
        # What is found takes the place of the queries, beside the inner MLP: the second product reads both at once.
        query.copy_(attend(heads, self.index))
        self.activate(projected[:, split:])
        outward = projected[:, 2 * keys * self.head_width :]
        return F.linear(outward, self.weight_out, self.bias_out).view_as(hidden).add_(hidden)
