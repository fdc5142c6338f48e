"""What a window of steps comes to: loss, speed, waiting, memory, operations."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from pipelines.feed import GlobalBatch, MicroBatch
from pipelines.training.flops import FlopCounter


@dataclass
class _Window:
    """What has gathered since the last line."""

    started: float
    waited_s: float
    saving_s: float
    steps: int = 0
    samples: int = 0
    tokens: int = 0
    filled: int = 0
    """Positions of this rank's micro-batches that hold a token."""
    positions: int = 0
    vision_flops: float = 0.0
    """Of this rank's micro-batches, as `pipelines.training.flops` counts them."""
    language_flops: float = 0.0


class StepMeter:
    """Gathers a window of steps on every rank, without waiting for the device until the window is read.

    Args:
        device: This rank's.
        flops: Counts operations; without it none are reported.
        peak_tflops: What a device can do, in TFLOP/s; without it no share of that is reported.
    """

    def __init__(
        self, device: torch.device, flops: FlopCounter | None = None, peak_tflops: float | None = None
    ) -> None:
        self._device = device
        self._flops = flops
        self._peak_tflops = peak_tflops
        self._loss = torch.zeros((), device=device)
        self._window = _Window(time.perf_counter(), 0.0, 0.0)

    def add_loss(self, loss: torch.Tensor) -> None:
        """Add a micro-batch's share of its step's loss, as it went into the backward pass."""
        self._loss += loss.detach()

    def add_micro_batch(self, micro: MicroBatch) -> None:
        """Count the positions and the operations of a micro-batch of this rank."""
        self._window.filled += micro.num_tokens
        self._window.positions += micro.num_positions
        if self._flops and micro.num_tokens:
            flops = self._flops.count(micro.inputs)
            self._window.vision_flops += flops.vision
            self._window.language_flops += flops.language

    def add_step(self, batch: GlobalBatch) -> None:
        """Count a finished step."""
        self._window.steps += 1
        self._window.samples += len(batch.rows)
        self._window.tokens += batch.num_tokens

    def read(self, waited_s: float, saving_s: float, grad_norm: float | None) -> dict[str, float]:
        """The window's figures, over all ranks; starts a new window. Collective.

        Args:
            waited_s: Seconds that this rank's steps have waited for data since the run started.
            saving_s: Seconds that they have waited for checkpoints.
            grad_norm: Of the last step, before clipping.
        """
        window, now = self._window, time.perf_counter()
        elapsed = now - window.started
        waited = torch.tensor((waited_s - window.waited_s) / elapsed, device=self._device)
        counts = torch.tensor(
            [window.filled, window.positions, window.vision_flops, window.language_flops], device=self._device
        )
        means = torch.stack([self._loss / window.steps, waited, *counts.float()])
        dist.all_reduce(means)
        loss, wait_share, filled, positions, vision, language = (means / dist.get_world_size()).tolist()
        # The others wait for the rank that waits longest, and the run ends when one device is full.
        largest = torch.stack([waited, torch.tensor(_memory_gib(self._device), device=self._device)])
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        longest_wait, memory = largest.tolist()
        self._loss.zero_()
        self._window = _Window(now, waited_s, saving_s)
        figures = {
            "loss": loss,
            "seconds_per_step": elapsed / window.steps,
            "samples_per_s": window.samples / elapsed,
            "tokens_per_s": window.tokens / elapsed,
            "data_wait_share": wait_share,
            "data_wait_share_max": longest_wait,
            "padding_share": 1 - filled / positions if positions else 0.0,
            "checkpoint_s": saving_s - window.saving_s,
            "memory_gib": memory,
        }
        if self._flops:
            figures |= self._rates(vision / elapsed / 1e12, language / elapsed / 1e12)
        return figures if grad_norm is None else figures | {"grad_norm": grad_norm}

    def _rates(self, vision: float, language: float) -> dict[str, float]:
        """Operations per second of one device, in TFLOP/s, and as shares of what it can do."""
        rates = {"tflops_vision": vision, "tflops_language": language}
        if self._peak_tflops is None:
            return rates
        shares = {"mfu_vision": vision / self._peak_tflops, "mfu_language": language / self._peak_tflops}
        return rates | shares | {"mfu": sum(shares.values())}


def _memory_gib(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
