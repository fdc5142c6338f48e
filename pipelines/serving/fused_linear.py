"""What fused layers share: weights side by side that are stored once, and activations without a copy."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

_TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast")


def activation_in_place(name: str) -> Callable[[Tensor], Tensor]:
    """The activation that transformers calls `name`, which overwrites its input."""
    if name in _TANH_GELUS:  # transformers spells it out in eight operations
        return functools.partial(torch.ops.aten.gelu_, approximate="tanh")
    function = ACT2FN[name]
    return lambda inner: inner.copy_(function(inner))


def join_weights(linears: list[nn.Linear], dim: int) -> Tensor:
    """The weights of `linears` side by side, of which theirs become views."""
    joined = torch.cat([linear.weight.detach() for linear in linears], dim=dim)
    parts = joined.split([linear.weight.shape[dim] for linear in linears], dim=dim)
    for linear, part in zip(linears, parts, strict=True):
        linear.weight.data = part
    return joined
