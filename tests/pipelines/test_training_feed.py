"""What a recipe says of data and micro-batches reaches the feed, and changes no loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from pipelines.feed import Position, PreparedRows, TokenBudget
from pipelines.shards.manifest import Manifest
from pipelines.training.host import Host
from pipelines.training.loop import WorkerRun, grouped_by_step
from pipelines.training.metrics import StepMeter
from pipelines.training.process import prepare_process
from pipelines.training.ranks import Ranks
from pipelines.training.settings import TrainSettings
from pipelines.training.start import StartError, check_start, load_processor
from pipelines.training.watchdog import Watchdog
from tests.pipelines.test_training_variants import plain_losses
from tests.ranks import run_ranks
from tests.training import NUM_STEPS, recipe, write_data

BUDGETS = {
    "tokens": {"max_tokens": 200},
    "few images": {"max_tokens": 400, "max_images": 1},
    "packed": {"max_tokens": 400, "pack_to": 200},
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("prepared"))


def test_budgets_of_a_recipe_are_those_of_the_feed(prepared, tmp_path):
    assert recipe(prepared, tmp_path).batch.micro_batch == 2
    batch = recipe(prepared, tmp_path, batch__max_tokens=900, batch__max_images=3, batch__pack_to=450).batch
    assert batch.micro_batch == TokenBudget(tokens=900, images=3, line=450)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch__pack_to": 100}, "batch.pack_to bounds micro-batches of batch.max_tokens, which is not given"),
        ({"data__weights": [1.0, 2.0]}, "data.weights has 2 entries for 1 data.folders"),
        ({"data__weights": [0.0]}, "greater than 0"),
    ],
)
def test_settings_that_say_nothing_are_refused(prepared, tmp_path, changes, message):
    with pytest.raises(ValidationError, match=message):
        recipe(prepared, tmp_path, **changes)


def test_a_row_longer_than_a_micro_batch_is_refused_before_any_worker_starts(prepared, tmp_path):
    settings = recipe(prepared, tmp_path, batch__max_tokens=20)
    [folder] = settings.data.folders
    with pytest.raises(StartError, match=rf"{folder}: row \d+ has \d+ tokens, a micro-batch may hold 20"):
        check_start(settings, {folder: Manifest.load(folder)}, load_processor(settings.model))


def measure(rank: int, dumped: dict[str, Any], answer: str) -> None:
    device = prepare_process(1, on_gpu=False)
    ranks = Ranks(60)
    found = {}
    for stage in (2, 3):
        for name, budget in BUDGETS.items():
            settings = TrainSettings.model_validate(dumped | {"batch": {"global_size": 8, **budget}})
            settings.deepspeed.stage = stage
            rows, processor = PreparedRows(settings.data.folders), load_processor(settings.model)
            run = WorkerRun(settings, processor, rows, device, Host(), ranks, Watchdog(ranks, 60, 60))
            meter, measured = StepMeter(device), []
            with run.loader(Position(), NUM_STEPS) as loader:
                for step, micro_batches in enumerate(grouped_by_step(loader)):
                    run.step(step, micro_batches, meter)
                    meter.add_step(micro_batches[-1].batch)
                    figures = meter.read(loader.waited_s, 0.0, None)
                    measured.append(figures["loss"])
            found[f"stage {stage}, {name}"] = measured
            found[f"padding, {stage}, {name}"] = [figures["padding_share"]]
    if rank == 0:
        Path(answer).write_text(json.dumps(found))


def test_budgets_and_packing_change_no_loss_on_two_ranks(prepared: Path, tmp_path: Path) -> None:
    settings = recipe(prepared, tmp_path)
    answer = tmp_path / "losses.json"
    run_ranks(2, measure, settings.model_dump(mode="json"), str(answer), logs=tmp_path / "logs")
    twin = plain_losses(settings)
    found = json.loads(answer.read_text())
    padding = {name: found.pop(name)[0] for name in list(found) if name.startswith("padding")}
    assert padding["padding, 2, packed"] < padding["padding, 2, tokens"] < 0.5
    assert len(found) == 2 * len(BUDGETS)
    for name, losses in found.items():
        np.testing.assert_allclose(losses, twin, rtol=1e-5, err_msg=name)
