"""The parts of the trainer that need no Ray."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import ValidationError

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothImageProcessor, FlashSlothProcessor
from pipelines.encode import encoder_facts
from pipelines.feed import Position
from pipelines.shards.manifest import Manifest
from pipelines.training import process
from pipelines.training.checkpoint import (
    CheckpointError,
    CheckpointManifest,
    FileEntry,
    Progress,
    RunIdentity,
    find_problem,
    read_manifest,
    refuse_changed_run,
    sha256_of,
)
from pipelines.training.export import ExportError, fetch_export, load_export, read_export_step, write_export
from pipelines.training.metrics import RunLog, read_metrics, readable
from pipelines.training.optimization import (
    build_optimizer,
    deepspeed_config,
    freeze,
    parameter_groups,
    schedule_factor,
    set_learning_rates,
)
from pipelines.training.settings import ModelSettings, OptimSettings, TrainSettings
from pipelines.training.start import StartError, build_model, check_encoder, check_start, load_processor
from tests.prepared import coloured_rows, write_prepared

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"
OVERRIDES = {
    "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
    "query_hidden_size": 16,
}


def recipe(name: str, **changes) -> TrainSettings:
    return TrainSettings.model_validate(yaml.safe_load((RECIPES / f"{name}.yaml").read_text()) | changes)


@pytest.fixture
def preset(processor, tmp_path) -> ModelSettings:
    processor.save_pretrained(tmp_path / "processor")
    return ModelSettings(preset="tiny", processor=str(tmp_path / "processor"), overrides=OVERRIDES)


@pytest.fixture
def model(preset) -> FlashSlothForConditionalGeneration:
    return build_model(preset, load_processor(preset), "fp32", seed=0)


# Settings


def test_the_published_recipes_hold_the_published_numbers():
    align, instruct, hd = (recipe(name) for name in ("align", "instruct", "instruct-hd"))
    assert [r.batch.global_size for r in (align, instruct, hd)] == [256, 128, 128]
    assert [r.optim.lr for r in (align, instruct, hd)] == [1e-3, 2e-5, 2e-5]
    for settings in (align, instruct, hd):
        assert (settings.optim.schedule, settings.optim.warmup_ratio, settings.optim.weight_decay) == (
            "cosine",
            0.03,
            0,
        )
        assert (settings.epochs, settings.deepspeed.stage, settings.precision) == (1, 3, "bf16")
        assert settings.model.gradient_checkpointing == "full"
    assert align.train_parts == ["pooling", "projector"]
    assert set(hd.train_parts) - set(instruct.train_parts) == {"vision_tower"}


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("tiny-*.yaml")))
def test_the_tiny_recipes_train_on_two_cpus(name):
    settings = recipe(name)
    assert (settings.scaling.num_workers, settings.scaling.gpus_per_worker, settings.deepspeed.stage) == (2, 0, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch": {"global_size": 100, "micro_size": 16}}, r"100 is not divisible by 128 .*16 x .*8"),
        ({"model": {}}, "exactly one of checkpoint, backbones and preset; got none"),
        ({"model": {"preset": "tiny"}}, "needs model.processor"),
        ({"model": {"checkpoint": "x", "overrides": {"query_layer": 1}}}, "overrides changes a preset"),
        ({"train_parts": ["tower"]}, "'vision_tower', 'pooling'"),
        ({"optim": {"part_lr": {"vision_tower": 1e-6}}}, r"names \['vision_tower'\], which train_parts"),
        ({"run": {"name": "x", "keep": 1}}, "greater than or equal to 2"),
        ({"scaling": {"num_workers": [4, 12]}}, r"128 is not divisible by 192 .*16 x .*12"),
        ({"scaling": {"num_workers": [8, 4]}}, "smallest number 8 is above the largest 4"),
        ({"deepspeed": {"stage": 0}}, "stage 0 keeps no fp32 weights"),
        ({"deepspeed": {"stage": 2, "offload": "all"}}, "offload all needs deepspeed.stage 3 at least, and it is 2"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, words):
    with pytest.raises(ValidationError, match=words):
        recipe("instruct", **changes)


# What learns, and how fast


def test_only_the_named_parts_learn_and_biases_and_norms_do_not_decay(model):
    freeze(model, ["pooling", "language_model"])
    groups = parameter_groups(model, OptimSettings(lr=1.0, part_lr={"pooling": 0.5}, weight_decay=0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {(g["peak_lr"], g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in groups}
    assert set(found) == {(1.0, 0.1), (1.0, 0.0), (0.5, 0.1), (0.5, 0.0)}
    assert "model.language_model.final_layernorm.weight" in found[1.0, 0.0]
    assert all(".pooling." in name for name in found[0.5, 0.1] | found[0.5, 0.0])
    assert all(name.endswith(".bias") or "norm" in name for name in found[1.0, 0.0])
    assert not any("embedded_query" in name or "vision_tower" in name for group in found.values() for name in group)


def test_the_schedule_warms_up_and_decays_to_nothing():
    optim = OptimSettings(warmup_ratio=0.1)
    factors = [schedule_factor(step, 100, optim) for step in range(100)]
    assert factors[:10] == [pytest.approx((step + 1) / 10) for step in range(10)]
    assert factors[10] == 1.0 and factors[55] == pytest.approx(0.5, abs=0.02) and 0 < factors[99] < 1e-3
    assert factors[9:] == sorted(factors[9:], reverse=True)
    assert schedule_factor(99, 100, optim.model_copy(update={"schedule": "constant"})) == 1.0
    assert schedule_factor(0, 1, OptimSettings(warmup_ratio=0)) == 1.0


def test_learning_rates_follow_each_groups_peak(model):
    freeze(model, ["pooling", "projector"])
    optimizer = build_optimizer(model, OptimSettings(lr=1.0, part_lr={"pooling": 0.5}))
    set_learning_rates(optimizer, 0.1)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [pytest.approx(0.05), pytest.approx(0.1)]


def test_deepspeeds_configuration_follows_the_recipe_and_takes_options():
    settings = recipe("instruct-hd", deepspeed={"stage": 2, "options": {"zero_optimization": {"overlap_comm": False}}})
    config = deepspeed_config(settings, world_size=8)
    assert config["train_batch_size"] == 128
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 8 == 128
    assert config["zero_optimization"]["stage"] == 2 and config["zero_optimization"]["overlap_comm"] is False
    assert config["bf16"] == {"enabled": True}


# Where a run starts


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
    preset.overrides = OVERRIDES | {"pooling_size": 9}
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
    settings = recipe("instruct-hd")
    with pytest.raises(StartError, match=r"payload 'features'.*train_parts .*vision_tower"):
        check_start(settings, manifests(tmp_path, processor, a="features"), processor)
    check_start(settings, manifests(tmp_path, processor, b="pixels"), processor)
    check_start(recipe("instruct"), manifests(tmp_path, processor, a="features"), processor)


def test_data_of_another_processor_or_of_mixed_payloads_are_refused_naming_both(tmp_path, processor, tokenizer):
    other = FlashSlothProcessor(FlashSlothImageProcessor(size=126), tokenizer, num_image_tokens=9, query_separator="")
    one = manifests(tmp_path, processor, a="pixels")
    with pytest.raises(StartError, match=f"{processor.identity()[:12]}.*{other.identity()[:12]}"):
        check_start(recipe("instruct"), one, other)
    with pytest.raises(StartError, match="different payloads"):
        check_start(recipe("instruct"), one | manifests(tmp_path, processor, b="original"), processor)


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


# Checkpoints


IDENTITY = RunIdentity(
    data=["d"],
    seed=0,
    global_batch=8,
    length_group=8,
    train_parts=["pooling"],
    precision="fp32",
)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "run" / "step-00000004-aa"
    folder.mkdir(parents=True)
    entries = []
    for name in ("rank-0", "rank-1"):
        (folder / name).write_bytes(name.encode() * 100)
        digest = sha256_of(folder / name)
        entries.append(FileEntry(name=name, bytes=(folder / name).stat().st_size, sha256=digest))
    progress = Progress(step=4, position=Position(1, 2, 30))
    manifest = CheckpointManifest(progress=progress, updates=4, run=IDENTITY, world_size=2, files=entries)
    (folder / "checkpoint.json").write_text(manifest.model_dump_json())
    return folder


def problem_of(folder: Path) -> str | None:
    manifest = read_manifest(str(folder))
    return manifest if isinstance(manifest, str) else find_problem(folder, manifest.files)


def test_an_untouched_checkpoint_verifies_and_keeps_its_position(checkpoint):
    assert problem_of(checkpoint) is None
    read = CheckpointManifest.model_validate_json((checkpoint / "checkpoint.json").read_bytes())
    assert (read.progress, read.run) == (Progress(step=4, position=Position(1, 2, 30)), IDENTITY)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "rank-1").unlink(), "rank-1 is missing"),
        (lambda folder: (folder / "rank-1").write_bytes(b"short"), "rank-1 has 5 bytes, 600 were written"),
        (lambda folder: (folder / "rank-1").write_bytes(b"x" * 600), "rank-1 has sha256"),
        (lambda folder: (folder / "checkpoint.json").unlink(), "was never completed"),
        (lambda folder: (folder / "checkpoint.json").write_text('{"version": 2'), "checkpoint.json is damaged"),
    ],
)
def test_damage_is_found_and_named(checkpoint, damage, problem):
    damage(checkpoint)
    assert problem in problem_of(checkpoint)


def test_a_run_is_not_continued_with_other_settings(checkpoint):
    refuse_changed_run(str(checkpoint.parent), IDENTITY)
    changed = IDENTITY.model_copy(update={"precision": "bf16", "seed": 1})
    with pytest.raises(CheckpointError, match=r"seed was 0 and is now 1; precision was 'fp32' and is now 'bf16'"):
        refuse_changed_run(str(checkpoint.parent), changed)
    refuse_changed_run(str(checkpoint.parent / "elsewhere"), changed)


# Exports


def test_an_export_loads_and_replaces_the_one_before(model, processor, tmp_path):
    target = tmp_path / "export"
    for step in (1, 2):
        write_export(str(target), model, model.state_dict(), processor, step)
        assert read_export_step(str(target)) == step
    loaded = load_export(str(target), torch.float32)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in model.state_dict().items())
    assert FlashSlothProcessor.from_pretrained(target).identity() == processor.identity()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".export")] == []


def test_a_folder_that_is_no_checkpoint_is_refused_by_name(tmp_path):
    with pytest.raises(ExportError, match=r"nowhere: there is no such checkpoint folder"):
        fetch_export(str(tmp_path / "nowhere"))
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(ExportError, match=r"lacks config.json and model.safetensors or .*; it holds readme.txt"):
        fetch_export(str(tmp_path))


@pytest.mark.parametrize("wave", ["config.json", "tokenizer.json", "export.json"])
def test_an_export_that_is_killed_half_way_is_no_model_and_says_so(model, processor, tmp_path, monkeypatch, wave):
    """A kill leaves what is there, so `finally` must not run: the write of `wave` fails, and nothing is tidied."""
    target = tmp_path / "export"

    def kill(folder: Path, at: Path) -> None:
        raise KeyboardInterrupt

    save = processor.save_pretrained
    if wave == "config.json":
        monkeypatch.setattr(model, "save_pretrained", lambda folder, **_: (Path(folder).mkdir(), kill(folder, target)))
    elif wave == "tokenizer.json":
        monkeypatch.setattr(processor, "save_pretrained", lambda folder: kill(folder, target))
    else:
        monkeypatch.setattr(processor, "save_pretrained", save)
        monkeypatch.setattr("pipelines.training.export._replace", kill)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    with pytest.raises(KeyboardInterrupt):
        write_export(str(target), model, model.state_dict(), processor, step=1)
    [remains] = tmp_path.glob(".export.*.part")
    with pytest.raises(
        ExportError, match=r"no such checkpoint folder; \.export\.\w+\.part beside it is what an export"
    ):
        load_export(str(target), torch.float32)
    with pytest.raises(ExportError, match="is no checkpoint but what an export left that was killed half-way"):
        load_export(str(remains), torch.float32)
    assert read_export_step(str(target)) is None


def test_an_export_that_has_lost_a_file_is_refused_by_name(model, processor, tmp_path):
    write_export(str(tmp_path / "export"), model, model.state_dict(), processor, step=1)
    (tmp_path / "export" / "tokenizer.json").unlink()
    with pytest.raises(ExportError, match=r"export.json lists tokenizer.json, which is gone"):
        load_export(str(tmp_path / "export"), torch.float32)


def test_missing_weights_are_listed_not_made_up(model, processor, tmp_path):
    weights = model.state_dict()
    del weights["model.projector.linear_1.weight"]
    write_export(str(tmp_path / "export"), model, weights, processor, 1)
    with pytest.raises(ExportError, match=r"missing_keys: model\.projector\.linear_1\.weight"):
        load_export(str(tmp_path / "export"), torch.float32)


# What a run says


def figures(loss: float) -> dict[str, float]:
    return {
        "loss": loss,
        "lr": 1e-3,
        "epoch": 0.5,
        "grad_norm": 1.0,
        "samples_per_s": 10.0,
        "tokens_per_s": 900.0,
        "data_wait_share": 0.012,
        "memory_gib": 2.0,
        "seconds_left": 3700.0,
    }


def test_a_resumed_run_writes_over_what_it_does_again(tmp_path, capsys):
    run = str(tmp_path / "run")
    log = RunLog(run, num_steps=4, start_step=0)
    for step in (1, 2, 3):
        log.write(step, figures(float(step)))
    log.close()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')  # the process was killed here
    log = RunLog(run, num_steps=4, start_step=2)
    log.write(3, figures(30.0))
    log.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(run)] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert "step 3/4 | epoch 0.50 | loss 30.0000 | lr 1.00e-03" in capsys.readouterr().out
    assert list((tmp_path / "run" / "tensorboard").iterdir())


def test_the_line_is_readable():
    assert readable(5, 10, figures(0.25)) == (
        "step 5/10 | epoch 0.50 | loss 0.2500 | lr 1.00e-03 | grad 1.00 | 10.0 samples/s | 900 tokens/s | "
        "data wait 1.2% | 2.0 GiB | 1:01:40 left"
    )


# The process


def test_missing_tools_are_named_with_what_to_install(monkeypatch):
    process.require_compiler()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(process.CompilerError, match=r"no-such-compiler; .*apt-get install g\+\+"):
        process.require_compiler()


def test_dropout_is_a_function_of_seed_step_and_rank():
    def draw(*arguments: int) -> float:
        process.seed_step(*arguments)
        return torch.rand(1).item()

    assert draw(1, 2, 0) == draw(1, 2, 0)
    assert len({draw(1, 2, 0), draw(1, 2, 1), draw(1, 3, 0), draw(2, 2, 0)}) == 4


def test_the_checkpoint_manifest_is_plain_json(checkpoint):
    assert json.loads((checkpoint / "checkpoint.json").read_text())["progress"]["position"] == {
        "epoch": 1,
        "batch": 2,
        "samples_seen": 30,
    }
