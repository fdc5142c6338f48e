"""The released naming of tensors and of the fields of `config.json`, and ours.

The released naming is that of the published code (see the table in the README); its `config.json` is Phi's with a few
fields more, and leaves out the vision tower (SigLIP-so400m) and the ids of the placeholders.
"""

from __future__ import annotations

import re
from typing import Any

from .configuration_flashsloth import SO400M_PATCH14_384, FlashSlothConfig

# (released prefix, our prefix). {query} is the place of the embedded query module.
NAMES = (
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.layers.", "model.language_model.layers."),
    ("model.final_layernorm.", "model.language_model.final_layernorm."),
    ("lm_head.", "lm_head."),
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.pooling.mlp.0.", "model.pooling.score_in."),
    ("model.pooling.mlp.3.", "model.pooling.score_out."),
    ("model.mm_projector.0.", "model.projector.linear_1."),
    ("model.mm_projector.2.", "model.projector.linear_2."),
    ("model.learnable_tokens.token", "model.query_tokens"),
    ("model.lqformer.down_projector_learnable_text.", "{query}.down_text."),
    ("model.lqformer.down_projector_image.", "{query}.down_image."),
    ("model.lqformer.up_projector.", "{query}.up."),
    ("model.lqformer.layers.0.ln_text.", "{query}.norm_text."),
    ("model.lqformer.layers.0.ln_q.", "{query}.norm_query."),
    ("model.lqformer.layers.0.ln_kv.", "{query}.norm_image."),
    ("model.lqformer.layers.0.t2q_attn.", "{query}.text_attention."),
    ("model.lqformer.layers.0.i2q_attn.", "{query}.image_attention."),
)
# What a released checkpoint may hold though no forward of it ever reads it: dropped on the way in, and said so.
UNREAD = re.compile(
    r"model\.vision_tower\.vision_tower\.vision_model\.(post_layernorm|head)\.|\.rotary_emb\.inv_freq$|\.position_ids$"
)
_PHI_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "layer_norm_eps",
    "initializer_range",
    "qk_layernorm",
    "resid_pdrop",
    "embd_pdrop",
    "attention_dropout",
    "tie_word_embeddings",
    "use_cache",
)
_SIGLIP_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)


class ConversionError(ValueError):
    """The folder is not a checkpoint that can be converted; the message lists what is wrong with it."""


def released_name(name: str, config: FlashSlothConfig) -> str | None:
    """The released name of our tensor `name`; None where it has none."""
    return _rename(name, [(ours, theirs) for theirs, ours in _table(config)])


def our_name(name: str, config: FlashSlothConfig) -> str | None:
    """Our name of the released tensor `name`; None where it has none."""
    return _rename(name, _table(config))


def config_from_released(released: dict[str, Any]) -> FlashSlothConfig:
    """Our configuration from a released `config.json`.

    `vision_config` and the `*_token_id` fields, which released files leave out, default to SigLIP-so400m and the ids
    that the released tokenizer gives.
    """
    rope = {
        "rope_type": "default",
        "rope_theta": released.get("rope_theta", 10000.0),
        "partial_rotary_factor": released.get("partial_rotary_factor", 0.4),
    }
    text = {name: released[name] for name in _PHI_FIELDS if name in released} | {"rope_parameters": rope}
    vision = dict(released.get("vision_config") or SO400M_PATCH14_384 | {"num_hidden_layers": 27})
    vision |= {"num_hidden_layers": vision["num_hidden_layers"] - 1, "vision_use_head": False}
    ids = {k: released[k] for k in ("image_token_id", "query_token_id", "query_bias_token_id") if k in released}
    if released.get("mm_projector_type", "mlp2x_gelu") != "mlp2x_gelu":
        raise ConversionError(f"mm_projector_type is {released['mm_projector_type']!r}, only mlp2x_gelu is known")
    if "vision_config" in released:
        # Only the tiny test models say so; their inner width follows the vision width as 576 follows 1152.
        ids |= {"query_hidden_size": vision["hidden_size"] // 2, "eos_token_id": released.get("eos_token_id")}
        ids |= {"pad_token_id": released.get("pad_token_id", 0)}
    hd = released.get("image_hd") or released.get("model_hd")
    return FlashSlothConfig(text_config=text, vision_config=vision, tiling="hd" if hd else "base", **ids)


def config_to_released(config: FlashSlothConfig) -> dict[str, Any]:
    """The released `config.json` of our configuration, with the fields that released files leave out added."""
    text, vision = config.text_config.to_dict(), config.vision_config.to_dict()
    rope = text["rope_parameters"]
    return {name: text[name] for name in _PHI_FIELDS if name in text} | {
        "model_type": "flashsloth",
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "rope_scaling": None,
        "mm_hidden_size": vision["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "image_hd": config.tiling == "hd",
        "image_token_id": config.image_token_id,
        "query_token_id": config.query_token_id,
        "query_bias_token_id": config.query_bias_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "vision_config": {name: vision[name] for name in _SIGLIP_FIELDS}
        | {"num_hidden_layers": vision["num_hidden_layers"] + 1},
    }


def _table(config: FlashSlothConfig) -> list[tuple[str, str]]:
    query = f"model.language_model.layers.{config.query_layer}.embedded_query"
    return [(theirs, ours.format(query=query)) for theirs, ours in NAMES]


def _rename(name: str, table: list[tuple[str, str]]) -> str | None:
    # The longest prefix counts: EmbQ's place lies inside the language model's layers.
    matches = [(len(old), old, new) for old, new in table if name.startswith(old)]
    if not matches:
        return None
    _, old, new = max(matches)
    return new + name[len(old) :]
