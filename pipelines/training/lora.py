"""LoRA (arXiv 2106.09685) on the language model: beside a frozen matrix W of each layer, a low-rank B A learns.

peft puts the adapters into the model in place, so `PARTS` and the names of all other parameters stay as they are; an
adapted `q_proj.weight` becomes `q_proj.base_layer.weight`. Only adapters have gradients, optimizer state and a place in
checkpoints. The export adds them to W: it is a model like any other.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from flashsloth import FlashSlothForConditionalGeneration
from pipelines.training.model_settings import LoraSettings

_BASE = ".base_layer."
_FACTORS = (".lora_A.default.", ".lora_B.default.")


def add_adapters(model: FlashSlothForConditionalGeneration, lora: LoraSettings) -> None:
    """Put adapters beside `lora.target_modules` of every decoder layer of `model`, in the type of its weights.

    They start as no change at all: B is zero. A is drawn from torch's generator, so every rank draws the same.
    """
    # Imported where it is needed: it takes as long as torch.
    from peft import LoraConfig, inject_adapter_in_model

    names = "|".join(lora.target_modules)
    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]  # typed int, used as a number
        lora_dropout=lora.dropout,
        # Whole names: the embedded query module, which learns as a whole, has a q_proj too.
        target_modules=rf"layers\.\d+\.(self_attn|mlp)\.({names})",
    )
    inject_adapter_in_model(config, model.model.language_model)


def is_adapter(name: str) -> bool:
    """Whether a parameter of this name belongs to an adapter."""
    return any(factor in name for factor in _FACTORS)


def merge_adapters(weights: Mapping[str, torch.Tensor], lora: LoraSettings) -> dict[str, torch.Tensor]:
    """The weights of the model without adapters that computes what `weights` with adapters do.

    The sum is made in float32 and rounded once, to the type of the weights.

    Args:
        weights: State dict of a model that `add_adapters` changed.
        lora: What it was given.

    Returns:
        State dict of the model that it was before.
    """
    merged = {}
    for name, weight in weights.items():
        if is_adapter(name):
            continue
        down, up = (weights.get(name.replace(_BASE, factor)) for factor in _FACTORS)
        if _BASE in name and down is not None and up is not None:  # a bias has none
            change = lora.alpha / lora.rank * (up.float() @ down.float())
            weight = (weight.float() + change).to(weight.dtype)
        merged[name.replace(_BASE, ".")] = weight
    return merged
