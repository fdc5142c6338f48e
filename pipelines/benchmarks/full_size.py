"""The recipes at full size on one GPU: MFU, memory and the parts of a step, with random weights and made-up rows.

Nothing but the start differs from `jobs/recipes`: 3.2B random parameters in place of a checkpoint, one worker, and
micro-batches of a token budget, packed, because 128 rows would otherwise be dealt to one GPU in the shares of eight.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from pipelines.benchmarks.conversations import Shape, draw_shapes, write_folder
from pipelines.benchmarks.sizes import full_size_processor
from pipelines.benchmarks.table import Bound, Table
from pipelines.benchmarks.timed_steps import WARM_UP, time_steps
from pipelines.training.launch import resolve_settings
from pipelines.training.settings import TrainSettings

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"
WANTED = {"align": 0.40, "instruct": 0.45, "instruct-hd": 0.45}
"""Recipe -> the share of the chip's peak that its model FLOPs should reach, recomputation excluded."""
_TIMED_STEPS = 4  # and as many again, part by part
_LINE = 4096  # positions of a packed line
_CAPTION = 14.0  # tokens, mean


def measure_full_size(work: Path, seed: int, quick: bool) -> tuple[list[Table], list[Bound], dict[str, Any]]:
    """Run every recipe of `WANTED`; with `quick` at the tiny size, on a GPU or not, where the figures mean nothing.

    Raises:
        ValueError: there is no GPU, or a recipe failed.
    """
    on_gpu = torch.cuda.is_available()
    if not (on_gpu or quick):
        raise ValueError("the part full_size needs a GPU; --quick shows that it runs, at a tiny size on the CPU")
    found = {name: time_steps(recipe_settings(work, name, seed, on_gpu, quick)) for name in WANTED}
    bounds = [
        Bound(name=f"MFU of {name}", sense="at least", wanted=wanted, measured=found[name]["figures"]["mfu"])
        for name, wanted in WANTED.items()
    ]
    return [_rates(found), _parts(found)], [] if quick else bounds, {"full_size": found}


def recipe_settings(work: Path, name: str, seed: int, on_gpu: bool, quick: bool) -> TrainSettings:
    """The settings of a recipe for one worker, and what they read: a processor and a prepared folder in `work`."""
    recipe = yaml.safe_load((RECIPES / f"{name}.yaml").read_text("utf-8"))
    tiling = recipe["model"].get("tiling", "base")
    processor = full_size_processor(tiling, quick)
    saved = work / f"processor-{tiling}-{processor.image_processor.size}"
    processor.save_pretrained(saved)
    rows = 16 if quick else 2 * recipe["batch"]["global_size"]
    draw = draw_captions if name == "align" else draw_shapes
    folder = work / f"full-size-{name}-{processor.image_processor.size}-{seed}-{rows}"
    recipe["model"] = {
        "preset": "tiny" if quick else "base" if tiling == "base" else "hd",
        "processor": str(saved),
        "gradient_checkpointing": recipe["model"]["gradient_checkpointing"],
        "overrides": {"text_config": {"max_position_embeddings": _LINE}} if quick else {},
    }
    recipe["data"] |= {"folders": [write_folder(folder, draw(rows, seed, processor.num_image_tokens), processor, seed)]}
    recipe["batch"] = {
        "global_size": 2 if quick else recipe["batch"]["global_size"],
        "max_tokens": 2 * _LINE,
        "pack_to": _LINE,
    }
    recipe["max_steps"] = WARM_UP + 2 * (1 if quick else _TIMED_STEPS)
    recipe["scaling"] = {"num_workers": 1, "cpus_per_worker": os.cpu_count() or 1, "gpus_per_worker": int(on_gpu)}
    recipe["run"] |= {"storage": str(work / "runs"), "seed": seed}
    return resolve_settings(TrainSettings.model_validate(recipe))


def draw_captions(count: int, seed: int, image_tokens: int = 81) -> list[Shape]:
    """`count` pictures with a caption each, of log-normal lengths: what alignment sees. The same for the same seed."""
    random = np.random.default_rng([seed, 2])
    lengths = np.maximum(1, random.lognormal(np.log(_CAPTION) - 0.18, 0.6, count).round()).astype(int)
    return [Shape(has_image=True, questions=[1], answers=[length]) for length in lengths.tolist()]


def _rates(found: dict[str, dict[str, Any]]) -> Table:
    rows = []
    for name, each in found.items():
        figures = each["figures"]
        shares = (figures["mfu"], figures["mfu_vision"], figures["mfu_language"])
        rates = f"{figures['samples_per_s']:.1f}", f"{figures['tokens_per_s']:,.0f}"
        cells = [
            *(f"{share:.1%}" for share in shares),
            f"{figures['memory_gib']:.1f}",
            f"{figures['padding_share']:.1%}",
        ]
        rows.append([name, f"{figures['seconds_per_step']:.2f}", *rates, *cells])
    peak = next(iter(found.values()))["peak"]
    columns = ["recipe", "step, s", "samples/s", "tokens/s", "MFU", "of it vision", "language", "peak GiB", "padding"]
    notes = [f"Model FLOPs without recomputation, of {peak['tflops']:,.1f} TFLOP/s {peak['source']}."]
    return Table(title="Recipes on one device, random weights", columns=columns, rows=rows, notes=notes)


def _parts(found: dict[str, dict[str, Any]]) -> Table:
    names = list(dict.fromkeys(part for each in found.values() for part in each["parts"]))
    rows = [[name, *(f"{1000 * each['parts'].get(part, 0.0):,.0f}" for part in names)] for name, each in found.items()]
    notes = [
        "Other steps than above: the device is waited for at every border, and the tower is a part of the forward pass."
    ]
    return Table(title="Parts of a step, ms", columns=["recipe", *names], rows=rows, notes=notes)
