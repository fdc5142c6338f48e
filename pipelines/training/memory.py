"""What a worker of a run needs of its device's memory, by ZeRO stage: the arithmetic behind `deepspeed.stage`.

With P parameters of which L learn, W workers, and e bytes a weight (bf16 2, fp32 4), a worker holds

| stage | weights | gradients | optimizer: fp32 weights and two moments | while it updates |
|---|---|---|---|---|
| 0 (fp32 alone) | 4 P | 4 L | 8 L | |
| 1 | e P | e L | 12 L / W | u L / W |
| 2 | e P | e L / W | 12 L / W | u L / W |
| 3 | e P / W | e L / W | 12 L / W | u L / W |

where u is 4, a copy of the gradients in fp32, or 6, with one in bf16 for that while; AdamW, fused, needs none. That is
beside DeepSpeed's buckets, and the activations of the largest micro-batch. The stages cost more communication the
higher they are (2 once per micro-batch instead of once per step, 3 the weights twice per micro-batch too), so a run
takes the lowest one that fits. `tests/pipelines/test_training_memory.py` compares with what DeepSpeed holds, and the
activations with what a step on the CPU allocates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from flashsloth import FlashSlothConfig
from pipelines.training.optimization import deepspeed_config
from pipelines.training.settings import BatchSettings, TrainSettings

USABLE_SHARE = 0.9
"""Share of a GPU's memory that a plan may fill: its context, NCCL and fragments take the rest."""
_GIB = 2**30
_LOSS_BYTES = 12
"""Per logit: its log-probability, the gradient of that and its own, in fp32."""
_REMEDY = (
    "use more workers, deepspeed.offload, lora, a smaller batch.micro_size, or batch.max_tokens, which bounds the "
    "longest rows too"
)


class MemoryPlanError(ValueError):
    """A run's weights, gradients and optimizer state alone are more than its GPUs hold; the message has the numbers."""


class Sizes(NamedTuple):
    """Numbers of parameters."""

    total: int
    learning: int


class Work(NamedTuple):
    """The largest micro-batch that a worker may get."""

    tokens: int
    images: int
    loss_tokens: int
    """Of the tokens; logits are made of these alone."""


@dataclass(frozen=True)
class Memory:
    """Bytes that a worker needs of its device; what it offloads is not in it."""

    weights: int
    gradients: int
    optimizer: int
    buffers: int
    activations: int
    """An estimate."""
    update: int
    """For a moment of each step, when there are no activations."""

    @property
    def states(self) -> int:
        """What stays from step to step."""
        return self.weights + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """The most at any time."""
        return self.states + self.buffers + max(self.activations, self.update)


class Plan(NamedTuple):
    """The stage that a run takes, and why."""

    stage: int
    reason: str


def count_sizes(model: nn.Module) -> Sizes:
    """The parameters of a model in which `freeze` has said what learns; it may be on the meta device."""
    sizes = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    return Sizes(sum(size for size, _ in sizes), sum(size for size, learns in sizes if learns))


def largest_work(
    batch: BatchSettings, num_tokens: np.ndarray, num_loss_tokens: np.ndarray, has_image: np.ndarray
) -> Work:
    """The largest micro-batch of rows of these lengths: the longest rows together, as length groups bring them."""
    if not batch.max_tokens:
        images = batch.micro_size if has_image.any() else 0
        return Work(batch.micro_size * int(num_tokens.max()), images, batch.micro_size * int(num_loss_tokens.max()))
    images = batch.max_tokens // int(num_tokens[has_image].min()) if has_image.any() else 0
    loss_tokens = math.ceil(batch.max_tokens * float((num_loss_tokens / num_tokens).max()))
    return Work(batch.max_tokens, min(images, batch.max_images or images), loss_tokens)


def estimate(
    settings: TrainSettings, config: FlashSlothConfig, sizes: Sizes, work: Work, stage: int, world_size: int
) -> Memory:
    """What a worker needs at this stage; see the table above."""
    width = 2 if settings.precision == "bf16" else 4
    total, learning = sizes
    share = learning / world_size if stage else learning
    weights = width * total / (world_size if stage == 3 else 1)
    gradients = width * (share if stage > 1 else learning)
    optimizer, update = (12 * share, (6 if width == 2 else 4) * share) if stage else (8 * share, 0)
    if settings.deepspeed.offload != "none":
        optimizer = update = 0
    if settings.deepspeed.offload == "all":
        weights = 0
    activations = _activations(settings, config, work, width)
    parts = (weights, gradients, optimizer, _buffers(settings, sizes, stage, world_size, width), activations, update)
    return Memory(*(round(part) for part in parts))


def choose_stage(
    settings: TrainSettings, config: FlashSlothConfig, sizes: Sizes, work: Work, world_size: int, available: int | None
) -> Plan:
    """The stage that the settings name, or the lowest that fits; and the numbers, for the log.

    Args:
        available: Bytes of the smallest GPU among the workers', or None on CPUs, where nothing is compared.

    Raises:
        MemoryPlanError: No stage, or not the one that the settings name, leaves room for anything but the states.
    """
    named = settings.deepspeed.stage
    candidates = [named] if named is not None else possible_stages(settings, world_size)
    needs = {stage: estimate(settings, config, sizes, work, stage, world_size) for stage in candidates}
    if available is None:
        return Plan(candidates[0], describe(candidates[0], needs[candidates[0]], work))
    fitting = [stage for stage in candidates if needs[stage].peak <= USABLE_SHARE * available]
    chosen = fitting[0] if fitting else candidates[-1]
    if needs[chosen].states > available:
        raise MemoryPlanError(
            f"ZeRO-{chosen} on {world_size} worker{'s' * (world_size > 1)} needs {_gib(needs[chosen].states)} GiB a "
            "worker for weights, gradients and optimizer state alone, and the smallest GPU has "
            f"{_gib(available)} GiB: {_REMEDY}"
        )
    reason = f"{describe(chosen, needs[chosen], work)}; the smallest GPU has {_gib(available)} GiB"
    return Plan(chosen, reason if fitting else f"{reason}. WARNING: that may not be enough: {_REMEDY}")


def possible_stages(settings: TrainSettings, world_size: int) -> list[int]:
    """The stages that settings without a `deepspeed.stage` leave open to so many workers."""
    if settings.deepspeed.offload == "all":
        return [3]
    if world_size == 1 and settings.precision == "fp32" and settings.deepspeed.offload == "none":
        return [0]  # the others would keep the same weights twice, for nobody to share them with
    return [1, 2] if settings.model.compile else [1, 2, 3]


def describe(stage: int, need: Memory, work: Work) -> str:
    """One line: what a worker needs at this stage, by kind."""
    states = f"weights {_gib(need.weights)} + gradients {_gib(need.gradients)} + optimizer {_gib(need.optimizer)}"
    return (
        f"ZeRO-{stage}: about {_gib(need.peak)} GiB a worker: {states} + buffers {_gib(need.buffers)} + the larger of "
        f"activations {_gib(need.activations)} (micro-batch of {work.tokens:,} tokens, {work.images} images) and "
        f"update {_gib(need.update)}"
    )


def _buffers(settings: TrainSettings, sizes: Sizes, stage: int, world_size: int, width: int) -> float:
    """DeepSpeed's buckets of gradients, and under ZeRO-3 the weights that are gathered at once."""
    if not stage:
        return 0
    zero: dict[str, Any] = deepspeed_config(settings, world_size)["zero_optimization"]
    buckets = (2 if zero["overlap_comm"] else 1) * min(zero["reduce_bucket_size"], sizes.learning)
    if stage < 3:
        return width * (buckets + min(zero["allgather_bucket_size"], sizes.learning))
    gathered = zero.get("stage3_max_live_parameters", 10**9) + zero.get("stage3_prefetch_bucket_size", 5 * 10**7)
    return width * (buckets + min(gathered, sizes.total))


def _activations(settings: TrainSettings, config: FlashSlothConfig, work: Work, width: int) -> float:
    """What the forward pass keeps for the backward pass, and what comes on top of it at the worst moment."""
    text, vision = config.text_config, config.vision_config
    how = settings.model.gradient_checkpointing
    patches = work.images * config.num_tiles * config.num_patches
    # Elements that a layer keeps for each of its rows, as the layers of transformers 5.23 do (attention never keeps
    # its scores): inputs of norms and products, queries, keys, values, and the input of the activation function.
    in_text = 5 * text.hidden_size + text.intermediate_size + _for_weights(settings, config)
    in_vision = 8 * vision.hidden_size + 2 * vision.intermediate_size
    in_tower = patches * _stack(how, vision.num_hidden_layers, vision.hidden_size, in_vision)
    in_tower *= "vision_tower" in settings.train_parts
    kept = in_tower + work.tokens * _stack(how, text.num_hidden_layers, text.hidden_size, in_text)
    kept += patches * 6 * vision.hidden_size  # pooling
    if not _is_recomputed(how, config.query_layer):
        kept += (6 * work.tokens + 4 * patches) * config.query_hidden_size
    # The worst moment is the loss, the last layer of the language model, which may be recomputed, or that of the tower.
    ends = work.tokens * 3 * text.hidden_size  # of the stack; gone when the backward pass has reached its layers
    in_loss = width * (kept + ends) + _LOSS_BYTES * work.loss_tokens * text.vocab_size
    wide, wide_patch = (part.hidden_size + part.intermediate_size for part in (text, vision))
    if settings.lora or "language_model" not in settings.train_parts:
        wide += text.intermediate_size  # what the activation gives is not kept for weights, and lives for that while
    in_last = kept + work.tokens * _live(how, text.num_hidden_layers, in_text, wide)
    of_tower = in_tower + patches * _live(how, vision.num_hidden_layers, in_vision, wide_patch) * bool(in_tower)
    pixels = work.images * config.num_tiles * vision.num_channels * vision.image_size**2
    pixels *= 4 + (width if in_tower and width < 4 else 0)  # fp32, and a copy for the tower that learns
    return pixels + max(in_loss, width * in_last, width * of_tower)


def _is_recomputed(how: str, layer: int) -> bool:
    """Whether the layer of this number is, in the backward pass: with `selective` the first, the third, and so on."""
    return how == "full" or (how == "selective" and layer % 2 == 0)


def _live(how: str, layers: int, inside: int, gradients: int) -> int:
    """Elements for each row while the backward pass is in a stack's last layer: gradients, and what is recomputed."""
    return gradients + (inside if _is_recomputed(how, layers - 1) else 0)


def _stack(how: str, layers: int, hidden: int, inside: int) -> int:
    """Elements that a stack of layers keeps for each row: everything, or the inputs of layers that are recomputed."""
    return sum(hidden if _is_recomputed(how, layer) else inside for layer in range(layers))


def _for_weights(settings: TrainSettings, config: FlashSlothConfig) -> int:
    """Elements that a decoder layer keeps for each row because its matrices or adapters learn: what they multiply."""
    text = config.text_config
    if "language_model" not in settings.train_parts:
        return 0
    if settings.lora is None:
        return 2 * text.hidden_size + text.intermediate_size
    targets = settings.lora.target_modules
    inputs = sum(text.intermediate_size if name == "fc2" else text.hidden_size for name in targets)
    # With dropout each adapter has its own copy of its input, and a mask.
    return settings.lora.rank * len(targets) + (2 if settings.lora.dropout else 1) * inputs


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f}"
