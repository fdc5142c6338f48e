"""Compiled layers compute what eager ones do, under their old names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flashsloth import FlashSlothForConditionalGeneration
from pipelines.training.compilation import compile_layers
from pipelines.training.start import build_learner, load_processor
from tests.prepared import coloured_rows, model_batch
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


def _compiled(model: FlashSlothForConditionalGeneration) -> list[str]:
    return [name for name, module in model.named_modules() if module._compiled_call_impl is not None]
