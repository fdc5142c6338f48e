"""LoRA: what learns, what a checkpoint holds, that runs go on with it, and that the export is a plain model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors import safe_open

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.modeling_flashsloth import part_of
from pipelines.shards.manifest import Manifest
from pipelines.training.checkpoint import CheckpointError, refuse_changed_run
from pipelines.training.loop import run_identity, run_uri
from pipelines.training.lora import add_adapters, is_adapter, merge_adapters
from pipelines.training.model_settings import LoraSettings
from pipelines.training.optimization import freeze
from pipelines.training.settings import TrainSettings
from pipelines.training.start import build_learner, build_model, load_processor, start_identity
from tests.fixtures.tiny import build_processor, build_tiny_model
from tests.prepared import coloured_rows, model_batch
from tests.training import PARTS, check_export, losses, recipe, write_data
from tests.training_ranks import train_on

INSTRUCT = PARTS[1:]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("prepared"))


def with_adapters(lora: LoraSettings) -> tuple[FlashSlothForConditionalGeneration, dict[str, torch.Tensor]]:
    """The tiny model with adapters that do something, and what it takes."""
    processor = build_processor()
    model = build_tiny_model(processor)
    add_adapters(model, lora)
    freeze(model, INSTRUCT)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.normal_(std=0.2)
    return model.eval(), model_batch(processor, coloured_rows(1, turns=2))


def test_in_the_language_model_only_adapters_learn() -> None:
    model, inputs = with_adapters(LoraSettings(rank=4))
    model(**inputs, use_cache=False).loss.backward()
    learn = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    parts = {part_of(name) for name in learn}
    assert parts == set(INSTRUCT)
    in_language_model = {name for name in learn if part_of(name) == "language_model"}
    assert all(is_adapter(name) for name in in_language_model)
    assert len(in_language_model) == 3 * 6 * 2  # layers, matrices, factors
    assert all(model.get_parameter(name).grad.abs().sum() > 0 for name in in_language_model)


@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"], ["q_proj", "fc2"]])
def test_merging_gives_the_plain_model_that_computes_the_same(targets: list) -> None:
    lora = LoraSettings(rank=4, alpha=6.0, target_modules=targets)
    model, inputs = with_adapters(lora)
    plain = build_tiny_model(build_processor())
    before = plain(**inputs).logits
    plain.load_state_dict(merge_adapters(model.state_dict(), lora), strict=True)
    after = plain(**inputs).logits
    torch.testing.assert_close(after, model(**inputs).logits, rtol=1e-5, atol=1e-5)
    assert (after - before).abs().max() > 0.01


def test_adapters_begin_as_no_change_and_alike_in_every_process(prepared: Path, tmp_path: Path) -> None:
    settings = recipe(prepared, tmp_path, lora={"rank": 4}, train_parts=INSTRUCT)
    processor = load_processor(settings.model)
    one, other = (build_learner(settings, processor).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    plain = build_model(settings.model, processor, "fp32", settings.run.seed).state_dict()
    merged = merge_adapters(one, LoraSettings(rank=4))
    assert merged.keys() == plain.keys() and all(torch.equal(merged[name], plain[name]) for name in plain)
    settings.precision = "bf16"
    assert {parameter.dtype for parameter in build_learner(settings, processor).parameters()} == {torch.bfloat16}


def test_a_run_with_adapters_goes_on_bit_for_bit_and_exports_a_plain_model(prepared: Path, tmp_path: Path) -> None:
    lora = {"rank": 4, "alpha": 16.0, "dropout": 0.1}
    whole, cut, stage_3 = (
        recipe(prepared, tmp_path / name, lora=lora, train_parts=INSTRUCT) for name in ("whole", "cut", "stage-3")
    )
    said = train_on(2, whole, tmp_path / "logs")
    assert "with its adapters of rank 4 merged into the weights" in said
    expected = losses(whole)
    assert expected[6] < expected[1]

    assert "stopped at step 3 of 6" in train_on(2, cut, tmp_path / "logs", at_step=3)
    assert "(step 3, every file verified" in train_on(2, cut, tmp_path / "logs")
    assert losses(cut) == expected
    stage_3.deepspeed.stage, stage_3.model.gradient_checkpointing = 3, "full"
    train_on(2, stage_3, tmp_path / "logs")
    np.testing.assert_allclose(list(losses(stage_3).values()), list(expected.values()), rtol=1e-5)

    _check_checkpoint(whole)
    _refuses_another_rank(whole)
    exports = [_check_plain_export(settings, prepared) for settings in (whole, cut, stage_3)]
    for name, weight in exports[0].items():
        assert torch.equal(weight, exports[1][name])
        torch.testing.assert_close(weight, exports[2][name], rtol=1e-4, atol=1e-5)


def _check_checkpoint(settings: TrainSettings) -> None:
    """Of the language model it holds adapters alone."""
    stored = set()
    for path in sorted(Path(run_uri(settings.run)).glob("step-00000006-*/*.safetensors")):
        with safe_open(path, framework="pt") as file:
            stored |= {key.split("|", 2)[2] for key in file.keys()}  # noqa: SIM118  # not a mapping
    assert {part_of(name) for name in stored} == set(INSTRUCT)
    assert all(is_adapter(name) for name in stored if part_of(name) == "language_model")


def _refuses_another_rank(settings: TrainSettings) -> None:
    manifests = [Manifest.load(folder) for folder in settings.data.folders]
    for changed in (LoraSettings(rank=8, alpha=16.0, dropout=0.1), None):
        other = settings.model_copy(update={"lora": changed})
        with pytest.raises(CheckpointError, match=r"lora was \{'rank': 4, .* and is now (\{'rank': 8, |None)"):
            refuse_changed_run(run_uri(settings.run), run_identity(other, manifests, start_identity(other.model)))


def _check_plain_export(settings: TrainSettings, prepared: Path) -> dict[str, torch.Tensor]:
    exported = f"{run_uri(settings.run)}/export"
    check_export(exported, prepared)
    start = build_model(settings.model, load_processor(settings.model), "fp32", settings.run.seed).state_dict()
    trained = FlashSlothForConditionalGeneration.from_pretrained(exported).state_dict()
    changed = {name for name in start if not torch.equal(start[name], trained[name])}
    in_language_model = {name for name in changed if part_of(name) == "language_model"}
    assert len(in_language_model) == 2 * 6 and all(name.endswith(".weight") for name in in_language_model)
    assert not any(part_of(name) == "vision_tower" for name in changed)
    return trained


def test_adapters_of_a_language_model_that_does_not_learn_are_refused(prepared: Path, tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"lora is for the language_model, which train_parts .* does not train"):
        recipe(prepared, tmp_path, lora={}, train_parts=["projector"])
    with pytest.raises(ValidationError, match="target_modules"):
        recipe(prepared, tmp_path, lora={"target_modules": ["gate_proj"]})
