"""The DeepSpeed engine of a run: how it begins, and how gradients become an update of the weights."""

from __future__ import annotations

import contextlib
import io
import os
from typing import TYPE_CHECKING, NamedTuple

import torch

from pipelines.training.optimization import deepspeed_config
from pipelines.training.settings import TrainSettings

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def initialize(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, settings: TrainSettings, world_size: int
) -> DeepSpeedEngine:
    """DeepSpeed around `model`, at the ZeRO stage of the settings. Collective."""
    # DeepSpeed chooses its accelerator when it is imported, from the environment that only workers have.
    import deepspeed

    _import_muon_uncompiled()
    deepspeed.utils.logger.setLevel("WARNING")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that its operator was built
        deepspeed.init_distributed()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(settings, world_size))
    if world_size == 1 and engine.zero_optimization_stage() == 0:
        # There is nobody to add gradients up with, and it would copy them all to and fro.
        engine.enable_backward_allreduce = False
    return engine


def _import_muon_uncompiled() -> None:
    """Spare every worker torch's compiler, which takes longer to import than DeepSpeed itself.

    DeepSpeed asks of any optimizer whether it is its own Muon, which is compiled when it is imported. Ours is not.
    """
    name = "TORCHDYNAMO_DISABLE"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


class Update(NamedTuple):
    """What became of a step's gradients; the same on every rank."""

    skipped: bool
    """They were not finite, and the weights are as they were."""
    grad_norm: torch.Tensor | float | None
    """Before clipping."""


def update_weights(engine: DeepSpeedEngine, max_grad_norm: float) -> Update:
    """Let the optimizer step, unless the gradients are not finite. Collective.

    DeepSpeed's stage 0 neither looks whether they are, nor tells their norm; there both is done here, and the clipping.
    """
    if engine.zero_optimization_stage():
        engine.step()
        return Update(bool(engine.optimizer.overflow), engine.get_global_grad_norm())
    learning = [each for each in engine.module.parameters() if each.grad is not None]
    norm = torch.nn.utils.get_total_norm([each.grad for each in learning if each.grad is not None])
    if not torch.isfinite(norm):
        engine.zero_grad()
        return Update(True, norm)
    if max_grad_norm:
        torch.nn.utils.clip_grads_with_norm_(learning, max_grad_norm, norm)
    engine.step()
    return Update(False, norm)
