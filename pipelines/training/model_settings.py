"""Settings of what a run starts from, and of what of it learns."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, PositiveInt, model_validator

from pipelines.settings import Section

PartName = Literal["vision_tower", "pooling", "projector", "query_tokens", "embedded_query", "language_model"]
PhiModule = Literal["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"]


class Backbones(Section):
    """Where an alignment run takes its pretrained parts from: folders, or names on the Hugging Face hub."""

    language: str
    """Phi checkpoint."""
    vision: str
    """SigLIP checkpoint."""
    tokenizer: str | None = None
    """Tokenizer of the language model; by default the one that lies beside it."""


class ModelSettings(Section):
    """What a run starts from: exactly one of `checkpoint`, `backbones` and `preset`."""

    checkpoint: str | None = None
    """A `from_pretrained` folder of FlashSloth, such as the export of an earlier run; local or s3://."""
    backbones: Backbones | None = None
    """Pretrained Phi and SigLIP; what joins them starts from random numbers."""
    preset: Literal["tiny", "base", "hd"] | None = None
    """A shape from `FlashSlothConfig`, started from random numbers."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Fields of `FlashSlothConfig` that the preset changes."""
    processor: str | None = None
    """Folder of the processor that the data was prepared with. Required by a preset; a checkpoint brings its own."""
    tiling: Literal["base", "hd"] | None = None
    """Look at one tile an image (base) or five (hd); by default as the checkpoint says. HD starts from a base model."""
    gradient_checkpointing: Literal["off", "selective", "full"] = "off"
    """Recompute activations in the backward pass: of every second layer or of all. Less memory, up to a third more
    compute; a log line's MFU does not count it."""

    compile: bool = False
    """Compile layers with `torch.compile`, when they first run: minutes of start for faster steps. Not under ZeRO-3."""

    @model_validator(mode="after")
    def _one_start(self) -> ModelSettings:
        given = [name for name in ("checkpoint", "backbones", "preset") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of checkpoint, backbones and preset; got {given or 'none'}")
        if self.preset and not self.processor:
            raise ValueError("a preset needs model.processor, the folder of the processor that prepared the data")
        if self.overrides and not self.preset:
            raise ValueError(f"model.overrides changes a preset; this run starts from {given[0]}")
        return self


class LoraSettings(Section):
    """Adapters of low rank that learn in place of the language model's weights."""

    rank: PositiveInt = 128
    """Inner width of an adapter."""
    alpha: Annotated[float, Field(gt=0)] = 256.0
    """An adapter's output is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Of an adapter's input. Drawn per rank: above 0, losses depend on the number of workers."""
    target_modules: Annotated[list[PhiModule], Field(min_length=1)] = Field(
        default_factory=lambda: list(get_args(PhiModule))
    )
    """Matrices of each decoder layer that get an adapter; by default all of them."""
