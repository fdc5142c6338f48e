"""Where a FlashSloth begins: Phi and SigLIP folders joined into one model, or a tower taken out of one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, PhiForCausalLM, SiglipVisionModel
from transformers.utils import cached_file

from .configuration_flashsloth import FlashSlothConfig
from .modeling_flashsloth import FlashSlothForConditionalGeneration
from .processing_flashsloth import FlashSlothProcessor
from .vision import FlashSlothVisionTower

TOWER_PREFIX = "model.vision_tower."


class BackboneError(ValueError):
    """A folder or hub id does not hold the weights that are asked of it; the message lists the keys."""


def build_from_backbones(
    language: str, vision: str, processor: FlashSlothProcessor, dtype: torch.dtype = torch.float32, **overrides: Any
) -> FlashSlothForConditionalGeneration:
    """Join a Phi and a SigLIP, each a folder or a hub id; pooling, projector, query tokens and EmbQ start fresh.

    Sizes, tiling and ids of the configuration follow from the two and from `processor`; `overrides` are further fields
    of `FlashSlothConfig`. Seed torch before for a reproducible start.

    Raises:
        BackboneError: a backbone is of another kind, or weights are missing.
        ValueError: the parts do not fit; see `FlashSlothConfig.validate_architecture`.
    """
    config = backbones_config(language, vision, processor, **overrides)
    phi, loaded = PhiForCausalLM.from_pretrained(language, dtype=dtype, output_loading_info=True)
    if loaded["missing_keys"]:
        raise BackboneError(f"{language} lacks {_listed(loaded['missing_keys'])}")
    model = FlashSlothForConditionalGeneration(config).to(dtype)
    model.model.vision_tower.load_state_dict(_tower_weights(vision, dtype))
    # Strict but for EmbQ, which a Phi does not have.
    absent, unknown = model.model.language_model.load_state_dict(phi.model.state_dict(), strict=False)
    absent = [name for name in absent if ".embedded_query." not in name]
    if absent or unknown:
        raise BackboneError(f"{language}: missing {_listed(absent)}, unknown {_listed(unknown)}")
    model.lm_head.load_state_dict(phi.lm_head.state_dict())
    return model


def processor_fields(processor: FlashSlothProcessor) -> dict[str, Any]:
    """Fields of `FlashSlothConfig` that the processor of a new model decides."""
    return {
        "tiling": processor.image_processor.tiling,
        "num_query_tokens": processor.num_query_tokens,
        "image_token_id": processor.image_token_id,
        "query_token_id": processor.query_token_id,
        "query_bias_token_id": processor.query_bias_token_id,
        "eos_token_id": processor.eos_token_id,
        "pad_token_id": processor.pad_token_id,
    }


def backbones_config(language: str, vision: str, processor: FlashSlothProcessor, **overrides: Any) -> FlashSlothConfig:
    """The configuration of what `build_from_backbones` builds from the same arguments; it raises the same."""
    text_config = AutoConfig.from_pretrained(language)
    if text_config.model_type != "phi":
        raise BackboneError(f"{language} is a {text_config.model_type}, the language model of FlashSloth is a phi")
    config = FlashSlothConfig(
        text_config=text_config.to_dict(),
        vision_config=_tower_config(vision).to_dict(),
        **processor_fields(processor),
        **overrides,
    )
    if config.num_image_tokens != processor.num_image_tokens:
        raise ValueError(
            f"{vision} gives {config.num_image_tokens} visual tokens an image, the processor expands the placeholder "
            f"to {processor.num_image_tokens}: set num_image_tokens of the processor"
        )
    return config


def load_vision_tower(path: str, dtype: torch.dtype = torch.float32) -> FlashSlothVisionTower:
    """The tower alone, in evaluation mode, of a FlashSloth checkpoint or a SigLIP, each a folder or a hub id.

    Only the tower's tensors are read. Its `last_hidden_state` of float[B, 3, H, W] is float[B, P, V].

    Raises:
        BackboneError: there is no tower, or weights are missing.
    """
    tower = FlashSlothVisionTower(_tower_config(path)).to(dtype)
    tower.load_state_dict(_tower_weights(path, dtype))
    return tower.eval()


def _tower_config(path: str) -> Any:
    config = AutoConfig.from_pretrained(path)
    if config.model_type == FlashSlothConfig.model_type:
        return config.vision_config
    vision = config.vision_config if config.model_type == "siglip" else config
    if vision.model_type != "siglip_vision_model":
        raise BackboneError(f"{path} is a {config.model_type}, the tower of FlashSloth is a siglip")
    # The published model reads SigLIP's output before its last layer: that layer, the last norm and the head are left.
    return type(vision).from_dict(
        vision.to_dict() | {"num_hidden_layers": vision.num_hidden_layers - 1, "vision_use_head": False}
    )


def _tower_weights(path: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    config = AutoConfig.from_pretrained(path)
    if config.model_type == FlashSlothConfig.model_type:
        weights = _checkpoint_tower(path)
        return {name: tensor.to(dtype) for name, tensor in weights.items()}
    siglip, loaded = SiglipVisionModel.from_pretrained(path, dtype=dtype, output_loading_info=True)
    if loaded["missing_keys"]:
        raise BackboneError(f"{path} lacks {_listed(loaded['missing_keys'])}")
    last = len(siglip.encoder.layers) - 1
    unread = ("post_layernorm.", "head.", f"encoder.layers.{last}.")
    return {name: tensor for name, tensor in siglip.state_dict().items() if not name.startswith(unread)}


def _checkpoint_tower(path: str) -> dict[str, torch.Tensor]:
    index = cached_file(path, "model.safetensors.index.json", _raise_exceptions_for_missing_entries=False)
    single = cached_file(path, "model.safetensors", _raise_exceptions_for_missing_entries=False)
    if index is not None:
        files = sorted(Path(index).parent.glob("model-*.safetensors"))
    elif single is not None:
        files = [Path(single)]
    else:
        raise BackboneError(f"{path} holds no model.safetensors")
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in list(opened.keys()):
                if name.startswith(TOWER_PREFIX):
                    weights[name.removeprefix(TOWER_PREFIX)] = opened.get_tensor(name)
    if not weights:
        raise BackboneError(f"{path} holds no tensor named {TOWER_PREFIX}*")
    return weights


def _listed(names: Any) -> str:
    names = sorted(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"
