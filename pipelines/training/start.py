"""What a run starts from: the processor and the model that the recipe names, checked against the prepared data."""

from __future__ import annotations

import json
import os

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flashsloth import (
    FlashSlothConfig,
    FlashSlothForConditionalGeneration,
    FlashSlothImageProcessor,
    FlashSlothProcessor,
)
from flashsloth.backbones import backbones_config, build_from_backbones, processor_fields
from flashsloth.configuration_flashsloth import TILES
from pipelines.encode import encoder_facts
from pipelines.feed import BudgetError, TokenBudget
from pipelines.hub import only_local, where
from pipelines.shards.manifest import Manifest
from pipelines.training.export import export_config, fetch_export, load_export, weights_identity
from pipelines.training.lora import add_adapters
from pipelines.training.model_settings import ModelSettings
from pipelines.training.optimization import freeze
from pipelines.training.process import seed_start
from pipelines.training.settings import TrainSettings


class StartError(ValueError):
    """A run cannot start: two of its inputs contradict each other; the message names both."""


def load_processor(model: ModelSettings) -> FlashSlothProcessor:
    """The processor of the model that a run starts from.

    Raises:
        StartError: The folder holds no processor, the backbone no tokenizer.
        ExportError: `model.checkpoint` is no finished checkpoint.
    """
    if model.backbones and not model.processor:
        name = model.backbones.tokenizer or model.backbones.language
        processor = FlashSlothProcessor(FlashSlothImageProcessor(), _tokenizer(name))
    else:
        folder = model.processor or str(fetch_export(str(model.checkpoint)))
        local = only_local(folder)
        try:
            processor = FlashSlothProcessor.from_pretrained(folder, local_files_only=local)
        except (OSError, ValueError, TypeError) as error:
            raise StartError(
                f"{where(folder, local)}: no FlashSloth processor can be loaded from here: {error}"
            ) from error
    return _tiled(processor, model.tiling)


def _tokenizer(name: str) -> PreTrainedTokenizerBase:
    local = only_local(name)
    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=local)
    except (OSError, ValueError) as error:
        raise StartError(f"{where(name, local)}: no tokenizer can be loaded from here: {error}") from error


def build_model(
    model: ModelSettings, processor: FlashSlothProcessor, precision: str, seed: int
) -> FlashSlothForConditionalGeneration:
    """The model a run starts from, whole, on the CPU of every worker; DeepSpeed takes it apart afterwards.

    3.2B parameters in bf16 take 6.4 GB of host memory per worker for that moment. Building it in parts (`zero.Init`)
    would save them, but under transformers 5 it has left weights at random without an error (transformers#45313);
    here a missing or unknown weight is always an error.

    Raises:
        ExportError: A checkpoint lacks weights or has unknown ones.
        BackboneError: A backbone does.
    """
    seed_start(seed)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    if model.checkpoint:
        built = load_export(model.checkpoint, dtype, model.tiling)
    elif model.backbones:
        built = build_from_backbones(model.backbones.language, model.backbones.vision, processor, dtype=dtype)
    else:
        built = FlashSlothForConditionalGeneration(_preset(model, processor)).to(dtype)
    if model.gradient_checkpointing != "off":
        built.activation_checkpointing_enable()
        # It has made the embeddings of tokens and patches ask for gradients, for the sake of another kind of
        # checkpointing: a frozen tower would go through a whole backward pass.
        built.disable_input_require_grads()
    if model.gradient_checkpointing == "selective":
        stacks = (built.model.vision_tower.encoder.layers, built.model.language_model.layers)
        for layer in (layer for stack in stacks for layer in stack[1::2]):
            layer.gradient_checkpointing = False
    return built.train()


def start_identity(model: ModelSettings) -> dict[str, str]:
    """What a run starts from, wherever it lies: weights by their content, backbones of a hub by their names."""
    if model.checkpoint:
        return {"checkpoint": weights_identity(model.checkpoint)}
    if model.backbones:
        names = {"language": model.backbones.language, "vision": model.backbones.vision}
        return {part: weights_identity(name) if os.path.isdir(name) else name for part, name in names.items()}
    return {"preset": str(model.preset), "overrides": json.dumps(model.overrides, sort_keys=True)}


def build_learner(settings: TrainSettings, processor: FlashSlothProcessor) -> FlashSlothForConditionalGeneration:
    """The model as a run trains it: with its adapters, and with gradients where something learns."""
    model = build_model(settings.model, processor, settings.precision, settings.run.seed)
    if settings.lora:
        add_adapters(model, settings.lora)
    freeze(model, settings.train_parts)
    return model


def build_skeleton(settings: TrainSettings, processor: FlashSlothProcessor) -> FlashSlothForConditionalGeneration:
    """What `build_learner` builds, without weights: names, shapes, and what learns."""
    with torch.device("meta"):
        model = FlashSlothForConditionalGeneration(_config(settings.model, processor))
        if settings.lora:
            add_adapters(model, settings.lora)
    freeze(model, settings.train_parts)
    return model


def check_start(settings: TrainSettings, manifests: dict[str, Manifest], processor: FlashSlothProcessor) -> None:
    """Raise `StartError` where recipe, prepared data (folder -> manifest) and processor contradict each other."""
    payloads = {folder: manifest.payload for folder, manifest in manifests.items()}
    if len(set(payloads.values())) > 1:
        raise StartError(f"data.folders hold different payloads: {payloads}; a run reads one kind")
    for folder, manifest in manifests.items():
        if manifest.payload == "features" and "vision_tower" in settings.train_parts:
            raise StartError(
                f"{folder} holds payload 'features', what a frozen tower made of the images, and train_parts "
                f"{settings.train_parts} trains the vision_tower: prepare the data with payload 'pixels' or "
                "'original', or leave the tower out"
            )
        if isinstance(settings.batch.micro_batch, TokenBudget):
            lengths = np.array([tokens for shard in manifest.shards for tokens in shard.num_tokens])
            try:
                settings.batch.micro_batch.check(lengths)
            except BudgetError as error:
                raise StartError(f"{folder}: {error}") from error
        if manifest.processor_identity != processor.identity():
            raise StartError(
                f"{folder} was prepared by processor {manifest.processor_identity[:12]} (tiling {manifest.tiling}, "
                f"{manifest.num_image_tokens} tokens an image), the model's is {processor.identity()[:12]} (tiling "
                f"{processor.image_processor.tiling}, {processor.num_image_tokens} tokens an image): prepare the data "
                "with the processor of this model"
            )


def check_encoder(model: ModelSettings, manifests: dict[str, Manifest]) -> None:
    """Raise `StartError` where prepared features (folder -> manifest) are not of the tower that a run starts from."""
    made_by = {folder: each.encoder_identity for folder, each in manifests.items() if each.payload == "features"}
    if not made_by:
        return
    if model.preset:
        raise StartError(
            f"{next(iter(made_by))} holds features, and the tower of preset {model.preset} starts from random numbers, "
            "which made none of them: start from a checkpoint or from backbones, or prepare with payload 'pixels'"
        )
    tower = model.backbones.vision if model.backbones else str(fetch_export(str(model.checkpoint)))
    identity = encoder_facts(tower).identity
    for folder, other in made_by.items():
        if other != identity:
            raise StartError(
                f"{folder} holds features of the tower {other}, this run starts with the tower {identity} ({tower}): "
                "prepare the features with this tower, or start from a model that has theirs"
            )


def _config(model: ModelSettings, processor: FlashSlothProcessor) -> FlashSlothConfig:
    if model.checkpoint:
        return export_config(fetch_export(model.checkpoint), model.tiling)
    if model.backbones:
        return backbones_config(model.backbones.language, model.backbones.vision, processor)
    return _preset(model, processor)


def _preset(model: ModelSettings, processor: FlashSlothProcessor) -> FlashSlothConfig:
    """The preset's configuration; ids, tiling and vocabulary follow the processor where the recipe is silent."""
    vocabulary = -(-len(processor.tokenizer) // 8) * 8  # a multiple of 8 suits matrix units
    fields = processor_fields(processor) | model.overrides
    if model.preset == "tiny":
        fields["text_config"] = {"vocab_size": vocabulary} | fields.get("text_config", {})
        fields["vision_config"] = {"image_size": processor.image_processor.size} | fields.get("vision_config", {})
        config = FlashSlothConfig.tiny(**fields)
    else:
        config = FlashSlothConfig(**fields)
    if config.num_image_tokens != processor.num_image_tokens:
        raise StartError(
            f"preset {model.preset} makes {config.num_image_tokens} tokens of an image, the processor in "
            f"{model.processor} puts {processor.num_image_tokens}: change model.overrides or the processor"
        )
    return config


def _tiled(processor: FlashSlothProcessor, tiling: str | None) -> FlashSlothProcessor:
    images = processor.image_processor
    if tiling is None or tiling == images.tiling:
        return processor
    return FlashSlothProcessor(
        FlashSlothImageProcessor(tiling=tiling, size=images.size),
        processor.tokenizer,
        num_image_tokens=processor.num_image_tokens // images.num_tiles * TILES[tiling],
        num_query_tokens=processor.num_query_tokens,
        query_separator=processor.query_separator,
        max_length=processor.max_length,
        system=processor.system,
    )
