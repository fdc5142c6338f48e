"""Compiled layers compute what eager ones do, under their old names, alone and under DeepSpeed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flashsloth import FlashSlothForConditionalGeneration
from pipelines.feed import Position, PreparedRows
from pipelines.training.compilation import compile_layers
from pipelines.training.host import Host
from pipelines.training.loop import WorkerRun, grouped_by_step
from pipelines.training.metrics import StepMeter
from pipelines.training.process import prepare_process
from pipelines.training.ranks import Ranks
from pipelines.training.settings import TrainSettings
from pipelines.training.start import build_learner, load_processor
from pipelines.training.watchdog import Watchdog
from tests.prepared import coloured_rows, model_batch
from tests.ranks import run_ranks
from tests.training import TINY, recipe, write_data

ONE_LAYER = TINY | {"query_layer": 0, "text_config": TINY["text_config"] | {"num_hidden_layers": 1}}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("prepared"))


def train_a_little(prepared: Path, tmp_path: Path, compiled: bool, checkpointing: str) -> tuple[list[float], Any]:
    settings = recipe(prepared, tmp_path, model__overrides=ONE_LAYER, model__gradient_checkpointing=checkpointing)
    processor = load_processor(settings.model)
    model = build_learner(settings, processor)
    if compiled:
        compile_layers(model)
    inputs = model_batch(processor, coloured_rows(1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(3):
        loss = model(**inputs, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


@pytest.mark.parametrize("checkpointing", ["off", "full"])
def test_losses_are_those_of_eager_layers(prepared: Path, tmp_path: Path, checkpointing: str) -> None:
    expected, eager = train_a_little(prepared, tmp_path, False, checkpointing)
    found, model = train_a_little(prepared, tmp_path, True, checkpointing)
    assert found == pytest.approx(expected, rel=1e-5) and expected[2] < expected[0]
    assert list(model.state_dict()) == list(eager.state_dict())
    assert _compiled(model) and not _compiled(eager)


def measure(rank: int, dumped: dict[str, Any], answer: str) -> None:
    """Three steps, eager and compiled: images alone, mixed, text alone, which the tower's compiled layers pass too.

    Graphs are captured, guarded and differentiated as always, and run without inductor, which the test above covers:
    its C++ for all kinds of calls takes a compiler two minutes.
    """
    torch.compiler.set_stance("default", force_backend="aot_eager")
    device, ranks, found = prepare_process(1, on_gpu=False), Ranks(120), []
    for compiled in (False, True):
        settings = TrainSettings.model_validate(dumped)
        settings.model.compile = compiled
        rows, processor = PreparedRows(settings.data.folders), load_processor(settings.model)
        run = WorkerRun(settings, processor, rows, device, Host(), ranks, Watchdog(ranks, 120, 120))
        assert bool(_compiled(run.engine.module)) is compiled
        losses, meter = [], StepMeter(device)
        with run.loader(Position(), 3) as loader:
            for step, micro_batches in enumerate(grouped_by_step(loader)):
                run.step(step, micro_batches, meter)
                meter.add_step(micro_batches[-1].batch)
                losses.append(meter.read(loader.waited_s, 0.0, None)["loss"])
        found.append(losses)
    Path(answer).write_text(json.dumps(found))


def test_losses_under_deepspeed_are_those_of_eager_layers(prepared: Path, tmp_path: Path) -> None:
    settings = recipe(prepared, tmp_path, model__overrides=ONE_LAYER, batch__max_tokens=400, batch__pack_to=200)
    run_ranks(1, measure, settings.model_dump(mode="json"), str(tmp_path / "losses"), logs=tmp_path / "logs")
    eager, compiled = json.loads((tmp_path / "losses").read_text())
    assert compiled == pytest.approx(eager, rel=1e-5) and eager[2] < eager[0]


def _compiled(model: FlashSlothForConditionalGeneration) -> list[str]:
    return [name for name, module in model.named_modules() if module._compiled_call_impl is not None]
