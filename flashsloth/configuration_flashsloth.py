"""The shape of a FlashSloth model (arXiv 2412.04317): a SigLIP tower, a Phi language model, and what joins them."""

# No "from __future__ import annotations" here: `strict` checks the values of fields by their annotations.
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import PhiConfig, PreTrainedConfig, SiglipVisionConfig

# SigLIP-so400m-patch14-384 without its last layer: the published model reads the output of layer 26 of 27.
SO400M_PATCH14_384 = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
    "vision_use_head": False,
}
PHI_2 = {
    "vocab_size": 51200,
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.4},
    # Phi-2 was trained at 2048; FlashSloth's samples go to 3072 on the same rotary embedding.
    "max_position_embeddings": 3072,
}
# Whole image, and for HD its four quarters at twice the side.
TILES = {"base": 1, "hd": 5}


@strict
class FlashSlothConfig(PreTrainedConfig):
    """Configuration of `FlashSlothForConditionalGeneration`. The defaults are the published 3.2B model, base tiling.

    Attributes:
        vision_config: the tower; its `num_hidden_layers` counts the layers that run (26 of SigLIP's 27).
        text_config: the Phi language model.
        image_token_id: placeholder id; one per visual token stands in `input_ids`.
        query_token_id: placeholder id; `num_query_tokens` of them close every question.
        query_bias_token_id: the token whose embedding is added to every query token (" ." in Phi-2's vocabulary).
        num_query_tokens: learnable query vectors per turn.
        query_layer: index of the decoder layer whose input passes through the embedded query module.
        query_hidden_size: inner width of the embedded query module.
        pooling_size: side of the square of patches that spatial attention pooling turns into one visual token.
        pooling_dropout: dropout inside the pooling score.
        tiling: "base" looks at one tile an image, "hd" at five.
        initializer_range: standard deviation of new linear layers.
    """

    model_type = "flashsloth"
    sub_configs_defaults = {"vision_config": SiglipVisionConfig, "text_config": PhiConfig}  # noqa: RUF012

    vision_config: Any = None
    text_config: Any = None
    image_token_id: int = 50297
    query_token_id: int = 50295
    query_bias_token_id: int = 764
    eos_token_id: int | None = 50296
    pad_token_id: int | None = 50256
    num_query_tokens: int = 9
    query_layer: int = 7
    query_hidden_size: int = 576
    pooling_size: int = 3
    pooling_dropout: float | int = 0.1
    tiling: Literal["base", "hd"] = "base"
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        if self.vision_config is None:
            self.vision_config = dict(SO400M_PATCH14_384)
        if self.text_config is None:
            self.text_config = dict(PHI_2)
        super().__post_init__(**kwargs)

    @property
    def num_tiles(self) -> int:
        """Tiles an image is cut into."""
        return TILES[self.tiling]

    @property
    def patch_grid(self) -> int:
        """Patches along one side of a tile (27 at full size)."""
        return self.vision_config.image_size // self.vision_config.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of a tile (729 at full size)."""
        return self.patch_grid**2

    @property
    def num_image_tokens(self) -> int:
        """Visual tokens an image takes in the sequence: 81 base, 405 HD at full size."""
        return self.num_tiles * (self.patch_grid // self.pooling_size) ** 2

    def validate_architecture(self) -> None:
        """Raise `ValueError` where parts of the model cannot fit together."""
        text, vision = self.text_config, self.vision_config
        if self.patch_grid % self.pooling_size:
            raise ValueError(
                f"{self.patch_grid} patches a side cannot be pooled in squares of {self.pooling_size}: "
                "choose image_size, patch_size and pooling_size so that they divide"
            )
        if not 0 <= self.query_layer < text.num_hidden_layers:
            raise ValueError(
                f"query_layer is {self.query_layer}, the language model has {text.num_hidden_layers} layers"
            )
        for name, width in (("query_hidden_size", self.query_hidden_size), ("vision width", vision.hidden_size)):
            if width % text.num_attention_heads:
                raise ValueError(f"{name} {width} is not divisible by the {text.num_attention_heads} attention heads")
        for name in ("image_token_id", "query_token_id", "query_bias_token_id"):
            if not 0 <= getattr(self, name) < text.vocab_size:
                raise ValueError(f"{name} is {getattr(self, name)}, the vocabulary has {text.vocab_size} entries")

    @classmethod
    def base(cls, **overrides: Any) -> "FlashSlothConfig":
        """The published 3.2B model: 81 visual tokens an image."""
        return cls(**overrides)

    @classmethod
    def hd(cls, **overrides: Any) -> "FlashSlothConfig":
        """The published HD model: five tiles, 405 visual tokens an image."""
        return cls(tiling="hd", **overrides)

    @classmethod
    def tiny(cls, **overrides: Any) -> "FlashSlothConfig":
        """Every part of the model at a size that trains on two CPU cores; 126-pixel tiles, 9 visual tokens a tile.

        `vision_config` and `text_config` given as dicts are merged into the tiny ones, so that a recipe can change a
        width without restating the rest.
        """
        vision = {
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 126,
            "patch_size": 14,
            "vision_use_head": False,
        }
        text = {
            "vocab_size": 512,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "max_position_embeddings": 1024,
            "rope_parameters": PHI_2["rope_parameters"],
        }
        tiny: dict[str, Any] = {
            "query_layer": 1,
            "query_hidden_size": 64,
            "query_bias_token_id": 0,
            "image_token_id": 511,
            "query_token_id": 509,
            "eos_token_id": 510,
            "pad_token_id": 0,
        }
        vision |= overrides.pop("vision_config", {})
        text |= overrides.pop("text_config", {})
        return cls(vision_config=vision, text_config=text, **(tiny | overrides))


__all__ = ["FlashSlothConfig"]
