"""What memory a run will need, before there is a cluster: `jobs/train.py --dry-run`."""

from __future__ import annotations

import numpy as np

from pipelines.shards.manifest import Manifest
from pipelines.training.memory import USABLE_SHARE, Memory, count_sizes, estimate, largest_work, possible_stages
from pipelines.training.settings import TrainSettings
from pipelines.training.start import build_skeleton, load_processor

# What torch reports of GPUs of these sizes, in GiB, rounded down: L4 and A10G; A100; L40S; A100, A800 and H100; H200.
GPU_GIB = {"24 GB": 22, "40 GB": 39, "48 GB": 44, "80 GB": 78, "141 GB": 139}
_COLUMNS = ("weights", "gradients", "optimizer", "buffers", "activations", "update", "peak")


def forecast(settings: TrainSettings) -> str:
    """A table: what a worker needs of its GPU, in GiB, by ZeRO stage and number of workers."""
    shards = [shard for folder in settings.data.folders for shard in Manifest.load(folder).shards]
    num_tokens = np.concatenate([np.array(shard.num_tokens, dtype=np.int64) for shard in shards])
    num_loss_tokens = np.concatenate([np.array(shard.num_loss_tokens, dtype=np.int64) for shard in shards])
    has_image = np.concatenate([np.array(shard.has_image, dtype=bool) for shard in shards])
    work = largest_work(settings.batch, num_tokens, num_loss_tokens, has_image)
    model = build_skeleton(settings, load_processor(settings.model))
    sizes = count_sizes(model)
    named = [] if settings.deepspeed.stage is None else [settings.deepspeed.stage]
    lines = [
        f"{sizes.total:,} parameters, of which {sizes.learning:,} learn; the largest micro-batch has "
        f"{work.tokens:,} tokens, {work.loss_tokens:,} of them learned, and {work.images} images",
        "GiB a worker; the peak is states and buffers and the larger of activations, an estimate, and update",
        _row("workers", "stage", *_COLUMNS, "fits GPUs of"),
    ]
    for workers in sorted(set(settings.scaling.bounds)):
        for stage in sorted({*possible_stages(settings, workers), *named}):
            need = estimate(settings, model.config, sizes, work, stage, workers)
            figures = [f"{getattr(need, column) / 2**30:.1f}" for column in _COLUMNS]
            lines.append(_row(str(workers), str(stage), *figures, ", ".join(_fitting(need)) or "none"))
    return "\n".join(lines)


def _fitting(need: Memory) -> list[str]:
    return [name for name, gib in GPU_GIB.items() if need.peak <= USABLE_SHARE * gib * 2**30]


def _row(*cells: str) -> str:
    return "".join(f"{cell:>12}" for cell in cells[:-1]) + f"  {cells[-1]}"
