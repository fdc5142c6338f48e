"""Runs that are interrupted and go on, on plain gloo ranks: the same losses, whatever the number of ranks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from flashsloth import FlashSlothForConditionalGeneration
from pipelines.training.host import Request
from pipelines.training.start import build_model, load_processor
from tests.training import NUM_STEPS, check_export, losses, recipe, write_data
from tests.training_ranks import train_on


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def undisturbed(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of one worker that is left alone, under ZeRO-2; under the other stages they are the same."""
    folder = tmp_path_factory.mktemp("undisturbed")
    whole = recipe(prepared, folder, run__checkpoint_every=100)
    train_on(1, whole, folder / "logs")
    return losses(whole)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_other_numbers_of_workers_go_on_with_the_same_losses(
    prepared: Path, undisturbed: dict[int, float], tmp_path: Path, stage: int
) -> None:
    assert list(undisturbed) == list(range(1, NUM_STEPS + 1))
    resized = recipe(prepared, tmp_path / "resized", deepspeed__stage=stage)
    said = train_on(4, resized, tmp_path / "logs", at_step=2)
    assert "stopped: stopped at step 2 of 6" in said
    said = train_on(2, resized, tmp_path / "logs", at_step=2)
    assert "(step 2, every file verified; written by 4 workers, loaded by 2)" in said
    said = train_on(4, resized, tmp_path / "logs")
    assert "(step 4, every file verified; written by 2 workers, loaded by 4)" in said
    found = losses(resized)
    assert list(found) == list(undisturbed)
    np.testing.assert_allclose(list(found.values()), list(undisturbed.values()), rtol=1e-5)


def test_the_same_number_of_workers_goes_on_bit_for_bit_and_to_another_stage_within_rounding(
    prepared: Path, tmp_path: Path
) -> None:
    whole, cut = (recipe(prepared, tmp_path / name, run__checkpoint_every=100) for name in ("whole", "cut"))
    train_on(2, whole, tmp_path / "logs")
    # A notice that a machine will be taken away: a checkpoint now, and on. Later, a stop.
    said = train_on(2, cut, tmp_path / "logs", at_step=1, request=Request.CHECKPOINT)
    assert "reported step 1" in said and losses(cut) == losses(whole)
    for name in (tmp_path / "cut/run").glob("step-00000006-*"):
        (name / "checkpoint.json").unlink(missing_ok=True)
    said = train_on(2, cut, tmp_path / "logs", at_step=2)
    assert "was never completed; falling back to the one before" in said and "(step 1, every file verified" in said
    assert "stopped at step 3 of 6" in said
    train_on(2, cut, tmp_path / "logs")
    assert losses(cut) == losses(whole)

    for name in (tmp_path / "cut/run").glob("step-00000006-*"):
        (name / "checkpoint.json").unlink(missing_ok=True)
    cut.deepspeed.stage = 3
    assert "(step 3, every file verified" in train_on(2, cut, tmp_path / "logs")
    np.testing.assert_allclose(list(losses(cut).values()), list(losses(whole).values()), rtol=1e-5)


def test_zero_3_exports_what_it_trained_and_nothing_else(prepared: Path, tmp_path: Path) -> None:
    settings = recipe(
        prepared, tmp_path, deepspeed__stage=3, train_parts=["pooling", "projector", "embedded_query"], max_steps=4
    )
    train_on(2, settings, tmp_path / "logs")
    exported = f"{settings.run.storage}/run/export"
    check_export(exported, prepared)
    start = build_model(settings.model, load_processor(settings.model), "fp32", settings.run.seed).state_dict()
    trained = FlashSlothForConditionalGeneration.from_pretrained(exported).state_dict()
    changed = {name for name in start if not torch.equal(start[name], trained[name])}
    # Not each of them: some norm's gradient may be below what moves a float32 at 1.
    assert changed <= {
        name for name in start if any(part in name for part in (".pooling.", ".projector.", ".embedded_query."))
    }
    assert len(changed) > 10
