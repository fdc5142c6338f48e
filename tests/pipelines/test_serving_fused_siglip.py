"""SigLIP in four matrix products a layer, against transformers' SigLIP."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashsloth import FlashSlothConfig
from flashsloth.vision import FlashSlothVisionTower
from pipelines.serving.fused_siglip import FusedSiglip


def build(**changes: Any) -> FlashSlothVisionTower:
    """A tiny tower none of whose weights is 0 or 1, in float64, so that what differs is no rounding."""
    config = FlashSlothConfig.tiny().vision_config.to_dict() | changes
    torch.manual_seed(1)
    tower = FlashSlothVisionTower(type(FlashSlothConfig.tiny().vision_config)(**config)).eval().double()
    with torch.no_grad():
        for parameter in tower.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return tower


@pytest.mark.parametrize("changes", [{}, {"hidden_act": "relu"}, {"image_size": 130}], ids=["plain", "relu", "margin"])
@pytest.mark.parametrize("num_images", [1, 3])
@torch.inference_mode()
def test_patches_are_those_of_transformers(changes: dict[str, Any], num_images: int) -> None:
    tower = build(**changes)
    side = tower.config.image_size  # with a margin, more than a whole number of patches: nobody looks at the rest
    pixels = torch.randn(num_images, 3, side, side, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = tower(pixels).last_hidden_state
    torch.testing.assert_close(FusedSiglip(tower)(pixels), expected, atol=1e-12, rtol=1e-12)
    # The tower goes on working, on the same memory.
    torch.testing.assert_close(tower(pixels).last_hidden_state, expected, atol=1e-12, rtol=1e-12)


def test_weights_are_stored_once() -> None:
    tower = build()
    before = {name: parameter.detach().clone() for name, parameter in tower.named_parameters()}
    fused = FusedSiglip(tower)
    attention = tower.encoder.layers[0].self_attn
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert linear.weight.untyped_storage().data_ptr() == fused.layers[0].weight_in.untyped_storage().data_ptr()
    for name, parameter in tower.named_parameters():
        assert torch.equal(parameter, before[name]), name
