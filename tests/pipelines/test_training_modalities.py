"""HD models on ranks with images, without, and with both: nobody waits for ever, and text costs the tower nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from flashsloth import FlashSlothImageProcessor, FlashSlothProcessor
from pipelines.feed import Position, PreparedRows
from pipelines.training.host import Host
from pipelines.training.loop import WorkerRun, grouped_by_step
from pipelines.training.metrics import StepMeter
from pipelines.training.process import prepare_process
from pipelines.training.ranks import Ranks
from pipelines.training.settings import TrainSettings
from pipelines.training.start import load_processor
from pipelines.training.watchdog import Watchdog
from tests.fixtures.tiny import train_tokenizer
from tests.pipelines.test_training_variants import plain_losses
from tests.prepared import coloured_rows, write_prepared
from tests.ranks import run_ranks
from tests.training import PARTS, recipe

FROZEN = PARTS[1:]
FEW = 5
"""Steps: an epoch, and what it has made of the weights."""
# Many small buckets: were gradients to come in another order on a rank without images, other ones would be added up.
SMALL_BUCKETS = {"options": {"zero_optimization": {"reduce_bucket_size": 6000}}}
LATE_BUCKETS = {"options": {"zero_optimization": {"reduce_bucket_size": 6000, "overlap_comm": True}}}
LEARNING: dict[str, dict[str, Any]] = {
    "stage 0": {"deepspeed": {"stage": 0}},
    "stage 1": {"deepspeed": {"stage": 1, **SMALL_BUCKETS}},
    "stage 1, offloaded": {"deepspeed": {"stage": 1, "offload": "optimizer"}},
    "stage 1, overlapping": {"deepspeed": {"stage": 1, **LATE_BUCKETS}},
    "stage 2": {"deepspeed": {"stage": 2, **SMALL_BUCKETS}},
    "stage 2, offloaded": {"deepspeed": {"stage": 2, "offload": "optimizer", **SMALL_BUCKETS}},
    "stage 2, recomputed": {"deepspeed": {"stage": 2, **SMALL_BUCKETS}, "model__gradient_checkpointing": "full"},
    "stage 3": {"deepspeed": {"stage": 3, **SMALL_BUCKETS}},
    "stage 3, offloaded": {"deepspeed": {"stage": 3, "offload": "all"}},
    "stage 3, recomputed": {"deepspeed": {"stage": 3}, "model__gradient_checkpointing": "full"},
}
RESTING: dict[str, dict[str, Any]] = {
    "stage 2, frozen": {"deepspeed": {"stage": 2}, "train_parts": FROZEN},
    "stage 3, frozen": {"deepspeed": {"stage": 3}, "train_parts": FROZEN},
}


@pytest.fixture(scope="module")
def prepared_hd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hd")
    images = FlashSlothImageProcessor(tiling="hd", size=126)
    processor = FlashSlothProcessor(images, train_tokenizer(), num_image_tokens=45)
    processor.save_pretrained(root / "processor")
    write_prepared(root / "data", coloured_rows(20, text_only_every=3), processor)
    return root


class TowerLog:
    """How many operations the tower's matrix products took in each of its forward passes."""

    def __init__(self, tower: nn.Module) -> None:
        self.operations: list[int] = []
        tower.register_forward_pre_hook(lambda *_: self.operations.append(0))
        for module in tower.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                module.register_forward_hook(self._count)

    def _count(self, module: nn.Module, arguments: Any, output: Any) -> None:
        assert isinstance(module, (nn.Linear, nn.Conv2d))
        inner = module.in_features if isinstance(module, nn.Linear) else 3 * module.kernel_size[0] ** 2
        self.operations[-1] += 2 * output.numel() * inner


def measure(rank: int, variants: dict[str, dict[str, Any]], answer: str) -> None:
    """Train every variant and write down its losses, and for each micro-batch of this rank [images, operations]."""
    device, ranks, found = prepare_process(1, on_gpu=False), Ranks(60), {}
    for name, dumped in variants.items():
        settings = TrainSettings.model_validate(dumped)
        rows, processor = PreparedRows(settings.data.folders), load_processor(settings.model)
        run = WorkerRun(settings, processor, rows, device, Host(), ranks, Watchdog(ranks, 60, 60))
        tower = TowerLog(run.engine.module.model.vision_tower)
        meter = StepMeter(device)
        losses, micro_steps = [], []
        with run.loader(Position(), FEW) as loader:
            for step, micro_batches in enumerate(grouped_by_step(loader)):
                tower.operations.clear()
                run.step(step, micro_batches, meter)
                meter.add_step(micro_batches[-1].batch)
                losses.append(meter.read(loader.waited_s, 0.0, None)["loss"])
                images = [len(micro.inputs["pixel_values"]) for micro in micro_batches]
                # Layers that are recomputed run again, and the tower as a whole does not.
                assert len(tower.operations) == len(images)
                micro_steps.append(list(zip(images, tower.operations, strict=True)))
        found[name] = {"losses": losses, "micro_steps": micro_steps}
    Path(f"{answer}.{rank}").write_text(json.dumps(found))


def test_text_costs_the_tower_nothing_and_no_rank_waits_for_another(prepared_hd: Path, tmp_path: Path) -> None:
    """Step 1 is all images, step 2 mixed on one rank and all images on the other, step 3 all text; then once more."""
    settings = {name: recipe(prepared_hd, tmp_path, **changes) for name, changes in (LEARNING | RESTING).items()}
    dumped = {name: each.model_dump(mode="json") for name, each in settings.items()}
    run_ranks(2, measure, dumped, str(tmp_path / "found"), logs=tmp_path / "logs")
    found = [json.loads((tmp_path / f"found.{rank}").read_text()) for rank in (0, 1)]
    twins = {
        name: plain_losses(recipe(prepared_hd, tmp_path, train_parts=parts))
        for name, parts in (("learning", PARTS), ("frozen", FROZEN))
    }
    for name in settings:
        by_rank = [each[name]["micro_steps"] for each in found]
        kinds = [[[images for images, _ in step] for step in steps] for steps in by_rank]
        assert sorted(each[:3] for each in kinds) == [[[2, 2], [2, 0], [0]], [[2, 2], [2, 2], [0]]]
        for images, operations in (each for steps in by_rank for step in steps for each in step):
            assert bool(images) == bool(operations), f"{name}: {images} images, {operations} operations"
        twin = twins["frozen" if name in RESTING else "learning"]
        np.testing.assert_allclose(found[0][name]["losses"], twin[:FEW], rtol=1e-5, err_msg=name)
