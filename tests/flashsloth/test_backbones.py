"""A FlashSloth from a Phi and a SigLIP folder, weight for weight."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PhiConfig, PhiForCausalLM, SiglipConfig, SiglipModel

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.backbones import BackboneError, build_from_backbones, load_vision_tower


@pytest.fixture(scope="module")
def phi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("phi")
    rope = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4}
    sizes = {"hidden_size": 40, "intermediate_size": 64, "num_hidden_layers": 9, "num_attention_heads": 4}
    PhiForCausalLM(PhiConfig(vocab_size=512, rope_parameters=rope, **sizes)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With its text half and its head, as SigLIP checkpoints are."""
    folder = tmp_path_factory.mktemp("siglip")
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    vision = sizes | {"image_size": 126, "patch_size": 14}
    SiglipModel(SiglipConfig(text_config=sizes | {"vocab_size": 99}, vision_config=vision)).save_pretrained(folder)
    return folder


def test_weights_are_those_of_the_backbones(phi: Path, siglip: Path, processor: FlashSlothProcessor) -> None:
    model = build_from_backbones(str(phi), str(siglip), processor, query_hidden_size=16)
    language, vision = PhiForCausalLM.from_pretrained(phi), SiglipModel.from_pretrained(siglip).vision_model
    ours = model.model.language_model.state_dict()
    for name, tensor in language.model.state_dict().items():
        assert torch.equal(ours[name], tensor), name
    assert torch.equal(model.lm_head.weight, language.lm_head.weight)
    assert len(model.model.vision_tower.encoder.layers) == 2, "the last layer is not read"
    pixels = torch.randn(2, 3, 126, 126)
    expected = vision(pixels, output_hidden_states=True).hidden_states[-2]
    torch.testing.assert_close(model.get_patch_features(pixels)[:, 0], expected, atol=1e-5, rtol=0)
    assert model.config.query_token_id == processor.query_token_id
    assert model.config.query_bias_token_id == processor.query_bias_token_id


def test_the_tower_alone(phi: Path, siglip: Path, processor: FlashSlothProcessor, tmp_path: Path) -> None:
    model = build_from_backbones(str(phi), str(siglip), processor, query_hidden_size=16).eval()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    pixels = torch.randn(2, 3, 126, 126)
    expected = model.get_patch_features(pixels)[:, 0]
    for folder in (tmp_path / "whole", tmp_path / "sharded", siglip):
        features = load_vision_tower(str(folder))(pixels).last_hidden_state
        torch.testing.assert_close(features, expected, atol=1e-5, rtol=0)


def test_lacking_weights_are_listed(phi: Path, siglip: Path, processor: FlashSlothProcessor, tmp_path: Path) -> None:
    weights = load_file(phi / "model.safetensors")
    del weights["model.layers.2.mlp.fc1.weight"]
    (tmp_path / "config.json").write_text((phi / "config.json").read_text())
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BackboneError, match=r"lacks model\.layers\.2\.mlp\.fc1\.weight"):
        build_from_backbones(str(tmp_path), str(siglip), processor)


def test_backbones_of_another_kind_are_named(phi: Path, siglip: Path, processor: FlashSlothProcessor) -> None:
    with pytest.raises(BackboneError, match="is a siglip, the language model of FlashSloth is a phi"):
        build_from_backbones(str(siglip), str(siglip), processor)
    with pytest.raises(BackboneError, match="is a phi, the tower of FlashSloth is a siglip"):
        load_vision_tower(str(phi))


def test_a_processor_with_another_number_of_visual_tokens_is_refused(
    phi: Path, siglip: Path, processor: FlashSlothProcessor
) -> None:
    processor.num_image_tokens = 81
    with pytest.raises(ValueError, match="gives 9 visual tokens an image, the processor expands the placeholder to 81"):
        build_from_backbones(str(phi), str(siglip), processor)


def test_a_joined_model_saves_and_loads(
    phi: Path, siglip: Path, processor: FlashSlothProcessor, tmp_path: Path
) -> None:
    model = build_from_backbones(str(phi), str(siglip), processor, query_hidden_size=16)
    model.save_pretrained(tmp_path)
    _, report = FlashSlothForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
