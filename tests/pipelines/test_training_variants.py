"""What must not change the losses: workers, micro-batches, the ZeRO stage, checkpointed activations. On plain ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flashsloth.image_processing_flashsloth import normalize_pixels
from pipelines.feed import BatchLoader, Feed, Position, PreparedRows
from pipelines.training.host import Host
from pipelines.training.loop import WorkerRun, grouped_by_step
from pipelines.training.memory import Sizes, Work, estimate
from pipelines.training.metrics import StepMeter
from pipelines.training.optimization import build_optimizer, freeze, schedule_factor, set_learning_rates
from pipelines.training.process import prepare_process
from pipelines.training.ranks import Ranks
from pipelines.training.settings import DeepSpeedSettings, TrainSettings
from pipelines.training.start import build_model, load_processor
from pipelines.training.watchdog import Watchdog
from tests.ranks import run_ranks
from tests.training import NUM_STEPS, recipe, write_data


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("prepared"))


def plain_losses(settings: TrainSettings) -> list[float]:
    """The slow obvious twin: no workers, no DeepSpeed, each global batch in one piece."""
    processor = load_processor(settings.model)
    rows = PreparedRows(settings.data.folders)
    model = build_model(settings.model, processor, "fp32", settings.run.seed)
    freeze(model, settings.train_parts)
    optimizer = build_optimizer(model, settings.optim)
    feed = Feed(rows.num_tokens, rows.num_loss_tokens, rows.has_image, settings.batch.global_size, settings.run.seed)
    result = []
    batches = feed.walk(Position(), NUM_STEPS)
    with BatchLoader(rows, batches, rank=0, world_size=1, micro_batch=100, processor=processor) as loader:
        for step, micro in enumerate(loader):
            set_learning_rates(optimizer, schedule_factor(step, NUM_STEPS, settings.optim))
            micro.inputs["pixel_values"] = normalize_pixels(micro.inputs["pixel_values"])
            loss = model(**micro.inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.optim.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            result.append(loss.item())
    return result


def measure_variants(rank: int, dumped: dict[str, Any], variants: list[tuple[Any, ...]], answer: str) -> None:
    """Train several variants of one recipe after each other and write down their losses."""
    device = prepare_process(1, on_gpu=False)
    settings = TrainSettings.model_validate(dumped)
    ranks = Ranks(60)
    found = {}
    for stage, precision, micro, checkpointing, offload in variants:
        variant = settings.model_copy(deep=True)
        variant.deepspeed.stage, variant.precision, variant.batch.micro_size = stage, precision, micro
        variant.model.gradient_checkpointing, variant.deepspeed.offload = checkpointing, offload
        rows, processor = PreparedRows(variant.data.folders), load_processor(variant.model)
        watchdog = Watchdog(ranks, 60, 60)
        run = WorkerRun(variant, processor, rows, device, Host(), ranks, watchdog)
        meter, measured = StepMeter(device), []
        with run.loader(Position(), NUM_STEPS) as loader:
            for step, micro_batches in enumerate(grouped_by_step(loader)):
                run.step(step, micro_batches, meter)
                meter.add_step(micro_batches[-1].batch)
                measured.append(meter.read(loader.waited_s, 0.0, None)["loss"])
        _check_optimizer_bytes(run)
        found[f"{stage} {precision} {micro} {checkpointing} {offload}"] = measured
    if rank == 0:
        Path(answer).write_text(json.dumps(found))


def _check_optimizer_bytes(run: WorkerRun) -> None:
    """DeepSpeed holds what the arithmetic of memory says, but for the padding of a tiny model."""
    zero = run.engine.optimizer
    names = {
        1: "single_partition_of_fp32_groups",
        2: "single_partition_of_fp32_groups",
        3: "fp32_partitioned_groups_flat",
    }
    masters = list(getattr(zero, names[run.stage])) if run.stage else []
    states = (zero.optimizer if run.stage else zero).state
    moments = [each for state in states.values() for each in state.values()]
    held = sum(each.nbytes for each in masters + moments)
    # Without offload, which keeps the same bytes elsewhere.
    settings = run.settings.model_copy(update={"deepspeed": DeepSpeedSettings(stage=run.stage)})
    model = run.engine.module
    learning = sum(getattr(each, "ds_numel", each.numel()) for each in model.parameters() if each.requires_grad)
    need = estimate(settings, model.config, Sizes(learning, learning), Work(1, 1, 1), run.stage, run.world_size)
    np.testing.assert_allclose(held, need.optimizer, rtol=0.01, err_msg=f"ZeRO-{run.stage}, {run.world_size} workers")


VARIANTS = {
    1: [
        (0, "fp32", 2, "off", "none"),
        (2, "fp32", 4, "off", "none"),
        (2, "fp32", 1, "selective", "none"),
        (1, "fp32", 2, "full", "optimizer"),
    ],
    2: [
        (2, "fp32", 4, "off", "optimizer"),
        (2, "fp32", 1, "selective", "none"),
        (1, "fp32", 2, "full", "none"),
        (0, "fp32", 2, "off", "none"),
        (3, "fp32", 2, "full", "none"),
        (3, "fp32", 4, "off", "all"),
        (2, "bf16", 4, "off", "none"),
    ],
}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_losses_depend_neither_on_workers_nor_on_micro_batches_nor_on_the_zero_stage(
    prepared: Path, tmp_path: Path, num_workers: int
) -> None:
    settings = recipe(prepared, tmp_path, scaling__num_workers=num_workers, batch__micro_size=4)
    answer = tmp_path / "variants.json"
    dumped = settings.model_dump(mode="json")
    run_ranks(num_workers, measure_variants, dumped, VARIANTS[num_workers], str(answer), logs=tmp_path / "logs")
    twin = plain_losses(settings)
    assert twin[-1] < 0.9 * twin[0]
    for name, found in json.loads(answer.read_text()).items():
        tolerance = 5e-2 if "bf16" in name else 1e-5
        np.testing.assert_allclose(found, twin, rtol=tolerance, err_msg=name)
