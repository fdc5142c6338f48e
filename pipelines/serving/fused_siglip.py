"""SigLIP for inference: the same numbers from four matrix products a layer, with little between them.

One image is too little work to hide what a layer of transformers does besides: thirty operations and a dozen calls of
modules, against the twelve here. Its twin in the tests is transformers' tower itself.

Shapes: N images, C channels, P patches, V width, H heads, D width of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import SiglipVisionModel

from pipelines.serving.fused_linear import activation_in_place, join_weights


class FusedSiglip:
    """The tower of a FlashSloth, ready to run. Its weights become views of the fused ones, so nothing is stored twice.

    Args:
        tower: in evaluation mode; it goes on working.
    """

    def __init__(self, tower: SiglipVisionModel) -> None:
        self.embeddings = tower.embeddings
        self.layers = [_Layer(layer) for layer in tower.encoder.layers]

    def __call__(self, pixels: Tensor) -> Tensor:
        """What the last layer makes of `pixels` float[N, C, height, width], without a norm: float[N, P, V]."""
        hidden = self._embed(pixels)
        for layer in self.layers:
            hidden = layer(hidden)
        return hidden

    def _embed(self, pixels: Tensor) -> Tensor:
        # A convolution whose steps are as wide as its window: a matrix product of the patches.
        convolution, side = self.embeddings.patch_embedding, self.embeddings.patch_size
        grid = self.embeddings.image_size // side
        squares = pixels[..., : grid * side, : grid * side].unflatten(3, (grid, side)).unflatten(2, (grid, side))
        patches = squares.permute(0, 2, 4, 1, 3, 5).reshape(len(pixels), grid * grid, -1)
        embedded = F.linear(patches, convolution.weight.flatten(1), convolution.bias)
        return embedded.add_(self.embeddings.position_embedding.weight)


class _Layer:
    def __init__(self, layer: Any) -> None:
        attention = layer.self_attn
        inward = [attention.q_proj, attention.k_proj, attention.v_proj]
        self.num_heads = attention.num_heads
        self.norms = layer.layer_norm1, layer.layer_norm2
        self.weight_in = join_weights(inward, dim=0)
        self.bias_in = torch.cat([linear.bias.detach() for linear in inward])
        self.out, self.fc1, self.fc2 = attention.out_proj, layer.mlp.fc1, layer.mlp.fc2
        self.activate = activation_in_place(attention.config.hidden_act)

    def __call__(self, hidden: Tensor) -> Tensor:
        """float[N, P, V] to float[N, P, V]."""
        projected = F.linear(self.norms[0](hidden), self.weight_in, self.bias_in)
        query, key, value = projected.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        hidden = self.out(found).add_(hidden)
        return self.fc2(self.activate(self.fc1(self.norms[1](hidden)))).add_(hidden)
