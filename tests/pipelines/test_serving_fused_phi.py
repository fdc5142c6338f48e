"""Phi in two matrix products a layer, against transformers' Phi."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration
from pipelines.serving.engine_settings import EngineSettings
from pipelines.serving.fused_phi import FusedPhi
from pipelines.serving.slot_attention import Prefill
from pipelines.serving.slots import Slots
from tests.fixtures.tiny import build_processor, build_tiny_model

VARIANTS: list[dict[str, Any]] = [
    {},
    {"hidden_act": "relu"},
    {"num_key_value_heads": 2},
    {"qk_layernorm": True},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 1.0}},
]


def build(**text_config: Any) -> FlashSlothForConditionalGeneration:
    """A tiny model none of whose weights is 0 or 1."""
    config = build_tiny_model(build_processor()).config.to_dict()
    config["text_config"] |= text_config
    torch.manual_seed(1)
    model = FlashSlothForConditionalGeneration(FlashSlothConfig.from_dict(config)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: next(iter(variant), "plain"))
@torch.inference_mode()
def test_hidden_states_are_those_of_transformers(variant: dict[str, Any]) -> None:
    model = build(**variant)
    phi = model.model.language_model
    embeds = torch.randn(3, 11, phi.config.hidden_size, generator=torch.Generator().manual_seed(0))
    expected = phi(inputs_embeds=embeds).last_hidden_state
    slots = Slots.allocate(phi.config, EngineSettings(max_slots=3), torch.float32, torch.device("cpu"))
    found = phi.final_layernorm(FusedPhi(phi)(embeds, torch.arange(11)[None], Prefill(slots, 0)))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    # The model goes on working, on the same memory.
    torch.testing.assert_close(phi(inputs_embeds=embeds).last_hidden_state, expected, atol=1e-5, rtol=1e-4)


def test_weights_are_stored_once() -> None:
    model = build()
    phi = model.model.language_model
    before = {name: parameter.detach().clone() for name, parameter in phi.named_parameters()}
    fused = FusedPhi(phi)
    layer = phi.layers[0]
    for linear in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj, layer.mlp.fc1):
        assert linear.weight.untyped_storage().data_ptr() == fused.layers[0].weight_in.untyped_storage().data_ptr()
    for linear in (layer.self_attn.dense, layer.mlp.fc2):
        assert linear.weight.untyped_storage().data_ptr() == fused.layers[0].weight_out.untyped_storage().data_ptr()
    for name, parameter in phi.named_parameters():
        assert torch.equal(parameter, before[name]), name
