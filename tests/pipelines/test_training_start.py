"""Where a run starts: model and processor that fit each other and the data, or an error that names both."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothImageProcessor, FlashSlothProcessor
from pipelines.encode import encoder_facts
from pipelines.shards.manifest import Manifest
from pipelines.training.checkpoint import CheckpointError, CheckpointManifest, Progress
from pipelines.training.export import MANIFEST_NAME, write_export
from pipelines.training.launch import check_inputs
from pipelines.training.loop import run_identity
from pipelines.training.model_settings import Backbones, ModelSettings
from pipelines.training.settings import TrainSettings
from pipelines.training.start import (
    StartError,
    build_model,
    check_encoder,
    check_start,
    load_processor,
    start_identity,
)
from tests.prepared import coloured_rows, write_prepared
from tests.training import TINY, published_recipe, recipe, write_data
from tests.training_ranks import train_on


@pytest.fixture
def preset(processor, tmp_path) -> ModelSettings:
    processor.save_pretrained(tmp_path / "processor")
    return ModelSettings(preset="tiny", processor=str(tmp_path / "processor"), overrides=TINY)


@pytest.fixture
def model(preset) -> FlashSlothForConditionalGeneration:
    return build_model(preset, load_processor(preset), "fp32", seed=0)


def test_a_preset_follows_its_processor_and_its_seed(preset, model, processor):
    assert model.config.image_token_id == processor.image_token_id
    assert model.config.text_config.vocab_size >= len(processor.tokenizer)
    assert model.training
    again = build_model(preset, load_processor(preset), "fp32", seed=0)
    other = build_model(preset, load_processor(preset), "fp32", seed=1)
    weights = [m.model.projector.linear_1.weight for m in (model, again, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_selective_checkpointing_recomputes_every_second_layer(preset):
    def recomputed(how: str) -> list[bool]:
        preset.gradient_checkpointing = how
        built = build_model(preset, load_processor(preset), "fp32", seed=0)
        return [layer.gradient_checkpointing for layer in built.model.language_model.layers]

    assert [recomputed(how) for how in ("off", "selective", "full")] == [[False, False], [True, False], [True, True]]


def test_a_preset_that_disagrees_with_its_processor_is_refused(preset):
    preset.overrides = TINY | {"pooling_size": 9}
    with pytest.raises(StartError, match=r"makes 1 tokens of an image, the processor in .* puts 9"):
        build_model(preset, load_processor(preset), "fp32", seed=0)


def test_hd_starts_from_a_base_checkpoint(model, processor, tmp_path):
    write_export(str(tmp_path / "export"), model, model.state_dict(), processor, step=1)
    settings = ModelSettings(checkpoint=str(tmp_path / "export"), tiling="hd")
    tiled = load_processor(settings)
    assert (tiled.num_image_tokens, tiled.image_processor.tiling) == (45, "hd")
    assert build_model(settings, tiled, "fp32", 0).config.num_image_tokens == 45
    assert load_processor(ModelSettings(checkpoint=str(tmp_path / "export"))).identity() == processor.identity()


def manifests(tmp_path, processor, **kinds) -> dict[str, Manifest]:
    folders = {
        name: write_prepared(tmp_path / name, coloured_rows(2), processor, payload=kinds[name]) for name in kinds
    }
    return {folder: Manifest.load(folder) for folder in folders.values()}


def test_features_and_a_learning_tower_are_refused_naming_both(tmp_path, processor):
    settings = published_recipe("instruct-hd")
    with pytest.raises(StartError, match=r"payload 'features'.*train_parts .*vision_tower"):
        check_start(settings, manifests(tmp_path, processor, a="features"), processor)
    check_start(settings, manifests(tmp_path, processor, b="pixels"), processor)
    check_start(published_recipe("instruct"), manifests(tmp_path, processor, a="features"), processor)


def test_data_of_another_processor_or_of_mixed_payloads_are_refused_naming_both(tmp_path, processor, tokenizer):
    other = FlashSlothProcessor(FlashSlothImageProcessor(size=126), tokenizer, num_image_tokens=9, query_separator="")
    one = manifests(tmp_path, processor, a="pixels")
    with pytest.raises(StartError, match=f"{processor.identity()[:12]}.*{other.identity()[:12]}"):
        check_start(published_recipe("instruct"), one, other)
    with pytest.raises(StartError, match="different payloads"):
        check_start(published_recipe("instruct"), one | manifests(tmp_path, processor, b="original"), processor)


def test_features_of_another_tower_are_refused_naming_both(tmp_path, processor, model):
    """Also the start of a run whose tower is the one that made them, stored in another precision."""
    for name, tower in (("own", model), ("other", copy.deepcopy(model))):
        if name == "other":
            next(tower.model.vision_tower.parameters()).data.mul_(2)
        tower.to(torch.bfloat16).save_pretrained(tmp_path / name)
    own, other = (encoder_facts(str(tmp_path / name)).identity for name in ("own", "other"))
    prepared = {
        folder: manifest.model_copy(update={"encoder_identity": own})
        for folder, manifest in manifests(tmp_path, processor, features="features", pixels="pixels").items()
    }
    check_encoder(ModelSettings(checkpoint=str(tmp_path / "own")), prepared)
    with pytest.raises(StartError, match=f"features of the tower {own}, this run starts with the tower {other}"):
        check_encoder(ModelSettings(checkpoint=str(tmp_path / "other")), prepared)
    with pytest.raises(StartError, match="tower of preset tiny starts from random numbers"):
        check_encoder(ModelSettings(preset="tiny", processor="p"), prepared)
    check_encoder(ModelSettings(preset="tiny", processor="p"), {"p": prepared[str(tmp_path / "pixels")]})


def test_a_run_does_not_go_on_from_another_start_and_says_which(tmp_path: Path) -> None:
    prepared = write_data(tmp_path / "prepared")
    settings = recipe(prepared, tmp_path)
    processor = load_processor(settings.model)
    for seed, name in enumerate(("begin", "other")):
        model = build_model(settings.model, processor, "fp32", seed)
        write_export(str(tmp_path / name), model, model.state_dict(), processor, step=4)
    # The same weights, in another place and without the list of what an export holds.
    shutil.copytree(tmp_path / "begin", tmp_path / "copy")
    (tmp_path / "copy" / MANIFEST_NAME).unlink()

    def starting(name: str) -> TrainSettings:
        return recipe(prepared, tmp_path, model={"checkpoint": str(tmp_path / name)})

    manifests = [Manifest.load(folder) for folder in settings.data.folders]
    identity = run_identity(starting("begin"), manifests, start_identity(starting("begin").model))
    saved = CheckpointManifest(progress=Progress(step=2), updates=2, run=identity, world_size=1, files=[])
    (tmp_path / "run" / "step-00000002-aa").mkdir(parents=True)
    (tmp_path / "run" / "step-00000002-aa" / "checkpoint.json").write_text(saved.model_dump_json())
    check_inputs(starting("begin"))
    check_inputs(starting("copy"))
    was, now = (start_identity(starting(name).model)["checkpoint"] for name in ("begin", "other"))
    with pytest.raises(
        CheckpointError, match=rf"start was {{'checkpoint': '{was}'}} and is now {{'checkpoint': '{now}'"
    ):
        check_inputs(starting("other"))
    with pytest.raises(
        CheckpointError, match=r"start was {'checkpoint': .* and is now {'preset': 'tiny', 'overrides': "
    ):
        check_inputs(settings)
    backbones = Backbones(language=str(tmp_path / "begin"), vision="google/siglip-so400m-patch14-384")
    found = start_identity(ModelSettings(backbones=backbones))
    assert found == {"language": was, "vision": "google/siglip-so400m-patch14-384"}


def test_zero_3_starts_from_no_checkpoint_with_missing_or_unknown_weights(tmp_path: Path) -> None:
    prepared = write_data(tmp_path / "prepared")
    settings = recipe(prepared, tmp_path, deepspeed__stage=3)
    processor = load_processor(settings.model)
    folder = tmp_path / "damaged"
    build_model(settings.model, processor, "fp32", 0).save_pretrained(folder)
    processor.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    missing = "model.projector.linear_1.weight"
    renamed = {("model.projector.linear_9.weight" if name == missing else name): each for name, each in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    settings = recipe(prepared, tmp_path, deepspeed__stage=3, model={"checkpoint": str(folder)})
    said = train_on(2, settings, tmp_path / "logs")
    assert said.count("failed: ") == 2, said
    assert f"missing_keys: {missing}; unexpected_keys: model.projector.linear_9.weight" in said
    assert not (tmp_path / "run" / "export").exists()
