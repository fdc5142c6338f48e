"""`torch.compile` for the layers of a model, one by one: they are alike, so that few are compiled, and no name changes.

What it gains: between the matrix products a Phi layer does its work element by element (turning queries and keys alone
is a dozen passes over them), and a compiled layer does it in a few. Attention over packed samples stays outside of what
is compiled: their lengths are others in every micro-batch.

Where a layer is recomputed in the backward pass, its attention and its MLP are compiled apart: checkpointing stays
outside, as a function that the compiler would be given anew at every call. ZeRO-3 is refused by the settings: it
gathers each module's weights when that module runs, which cuts a layer to pieces.
"""

from __future__ import annotations

import torch._dynamo

from flashsloth import FlashSlothForConditionalGeneration

_KINDS = 64
"""Kinds of calls that a layer's function may be compiled for. All layers share it, of tower and language model, with
images and without, of fixed and of varying sizes; at torch's own limit of 8 the rest would run uncompiled."""


def compile_layers(model: FlashSlothForConditionalGeneration) -> None:
    """Compile the layers of tower and language model when they first run; gradient checkpointing is set before."""
    torch._dynamo.config.recompile_limit = max(_KINDS, torch._dynamo.config.recompile_limit)
    for stack in (model.model.vision_tower.encoder.layers, model.model.language_model.layers):
        for layer in stack:
            for module in (layer.self_attn, layer.mlp) if layer.gradient_checkpointing else (layer,):
                module.compile()
