"""Which parameters learn, how fast, and how DeepSpeed spreads their state over the workers."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from flashsloth.modeling_flashsloth import part_of
from pipelines.training.lora import is_adapter
from pipelines.training.settings import OptimSettings, TrainSettings


def freeze(model: nn.Module, train_parts: Collection[str]) -> None:
    """Let only `train_parts` learn; where a part has adapters, only they do.

    Before `deepspeed.initialize`: it never notices a later change (DeepSpeed#6771).
    """
    adapted = {part_of(name) for name, _ in model.named_parameters() if is_adapter(name)}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part in train_parts and (part not in adapted or is_adapter(name)))


def parameter_groups(model: nn.Module, optim: OptimSettings) -> list[dict[str, Any]]:
    """The learning parameters, grouped by learning rate and weight decay.

    Biases and norms, which are the parameters of fewer than two dimensions, are not decayed. `peak_lr` stays in the
    group: `set_learning_rates` scales from it.
    """
    part_lr = {str(part): lr for part, lr in optim.part_lr.items()}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            lr = part_lr.get(part_of(name), optim.lr)
            decay = optim.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((lr, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": lr, "peak_lr": lr, "weight_decay": decay}
        for (lr, decay), parameters in groups.items()
    ]


def build_optimizer(model: nn.Module, optim: OptimSettings) -> torch.optim.Optimizer:
    """torch's AdamW: DeepSpeed's own would be compiled first, and its ZeRO stages take this one.

    Fused: one pass over weights, gradients and moments, and no copy of any of them.
    """
    return torch.optim.AdamW(parameter_groups(model, optim), betas=optim.betas, eps=optim.eps, fused=True)


def schedule_factor(step: int, num_steps: int, optim: OptimSettings) -> float:
    """Share of the peak learning rate at `step` (from 0) of `num_steps`: linear warm-up, then cosine to 0 or constant.

    A function of the step alone, so there is no scheduler whose state could be lost. The warm-up starts at 1/warm-up
    where the scheduler of transformers starts at 0, which would make the first step do nothing.
    """
    warmup = math.ceil(num_steps * optim.warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    if optim.schedule == "constant":
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def learning_rates(optim: OptimSettings, train_parts: Collection[str], factor: float) -> dict[str, float]:
    """The learning rates at `factor` times their peaks: `lr`, the highest, and `lr_PART` of parts with a lower one."""
    part_lr = {str(part): lr for part, lr in optim.part_lr.items()}
    peaks = {part: part_lr.get(part, optim.lr) for part in train_parts}
    highest = max(peaks.values())
    return {"lr": highest * factor} | {f"lr_{part}": lr * factor for part, lr in peaks.items() if lr != highest}


def deepspeed_config(settings: TrainSettings, world_size: int) -> dict[str, Any]:
    """DeepSpeed's configuration for this run; `deepspeed.options` of the recipe is laid over it."""
    batch = settings.batch
    on_gpu = settings.scaling.gpus_per_worker > 0
    # DeepSpeed insists on numbers that multiply; the loop itself says where an optimizer step ends.
    accumulation = -(-batch.global_size // (batch.micro_size * world_size))
    zero: dict[str, Any] = {
        "stage": settings.deepspeed.stage,
        "contiguous_gradients": True,
        # Overlapping needs a second stream, which a CPU has not.
        "overlap_comm": on_gpu,
        "reduce_bucket_size": 200_000_000,
        "allgather_bucket_size": 200_000_000,
    }
    if settings.deepspeed.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": on_gpu}
    if settings.deepspeed.offload == "all":
        zero["offload_param"] = {"device": "cpu", "pin_memory": on_gpu}
    config = {
        "train_batch_size": batch.micro_size * accumulation * world_size,
        "train_micro_batch_size_per_gpu": batch.micro_size,
        "gradient_accumulation_steps": accumulation,
        # Stage 0 computes the norm for itself alone: pipelines.training.engine clips there.
        "gradient_clipping": settings.optim.max_grad_norm if settings.deepspeed.stage else 0.0,
        "bf16": {"enabled": settings.precision == "bf16"},
        "zero_optimization": zero,
        # Offloading to the CPU works with torch's AdamW too, without compiling DeepSpeed's.
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**31,
    }
    return _laid_over(config, settings.deepspeed.options)


def _laid_over(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        nested = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _laid_over(merged[key], value) if nested else value
    return merged
