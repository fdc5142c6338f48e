"""What a recipe may say, and what follows from it: parts that learn, learning rates, DeepSpeed's configuration."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from pipelines.training import compiler, process
from pipelines.training.optimization import (
    build_optimizer,
    deepspeed_config,
    freeze,
    parameter_groups,
    schedule_factor,
    set_learning_rates,
)
from pipelines.training.settings import OptimSettings
from tests.training import RECIPES, published_recipe


def test_the_published_recipes_hold_the_published_numbers():
    align, instruct, hd = (published_recipe(name) for name in ("align", "instruct", "instruct-hd"))
    assert [r.batch.global_size for r in (align, instruct, hd)] == [256, 128, 128]
    assert [r.optim.lr for r in (align, instruct, hd)] == [1e-3, 2e-5, 2e-5]
    for settings in (align, instruct, hd):
        assert (settings.optim.schedule, settings.optim.warmup_ratio, settings.optim.weight_decay) == (
            "cosine",
            0.03,
            0,
        )
        assert (settings.epochs, settings.precision) == (1, "bf16")
        assert settings.deepspeed.stage is None  # what fits: test_training_memory
        assert settings.model.gradient_checkpointing == "full"
    assert align.train_parts == ["pooling", "projector"]
    assert set(hd.train_parts) - set(instruct.train_parts) == {"vision_tower"}


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("tiny-*.yaml")))
def test_the_tiny_recipes_train_on_two_cpus(name):
    settings = published_recipe(name)
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
        (
            {"model": {"checkpoint": "x", "compile": True}, "deepspeed": {"stage": 3}},
            "model.compile and ZeRO-3 exclude each other.*Use deepspeed.stage 1 or 2",
        ),
        ({"deepspeed": {"stage": 2, "offload": "all"}}, "offload all needs deepspeed.stage 3 at least, and it is 2"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, words):
    with pytest.raises(ValidationError, match=words):
        published_recipe("instruct", **changes)


# What learns, and how fast


def test_only_the_named_parts_learn_and_biases_and_norms_do_not_decay(tiny_model):
    freeze(tiny_model, ["pooling", "language_model"])
    groups = parameter_groups(tiny_model, OptimSettings(lr=1.0, part_lr={"pooling": 0.5}, weight_decay=0.1))
    names = {id(parameter): name for name, parameter in tiny_model.named_parameters()}
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


def test_learning_rates_follow_each_groups_peak(tiny_model):
    freeze(tiny_model, ["pooling", "projector"])
    optimizer = build_optimizer(tiny_model, OptimSettings(lr=1.0, part_lr={"pooling": 0.5}))
    set_learning_rates(optimizer, 0.1)
    assert sorted({group["lr"] for group in optimizer.param_groups}) == [pytest.approx(0.05), pytest.approx(0.1)]


def test_deepspeeds_configuration_follows_the_recipe_and_takes_options():
    settings = published_recipe(
        "instruct-hd", deepspeed={"stage": 2, "options": {"zero_optimization": {"overlap_comm": False}}}
    )
    config = deepspeed_config(settings, world_size=8)
    assert config["train_batch_size"] == 128
    assert config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * 8 == 128
    assert config["zero_optimization"]["stage"] == 2 and config["zero_optimization"]["overlap_comm"] is False
    assert config["bf16"] == {"enabled": True}


# The process


def test_missing_tools_are_named_with_what_to_install(monkeypatch):
    compiler.require_compiler()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(compiler.CompilerError, match=r"no-such-compiler; .*apt-get install g\+\+"):
        compiler.require_compiler()


def test_dropout_is_a_function_of_seed_step_and_rank():
    def draw(*arguments: int) -> float:
        process.seed_step(*arguments)
        return torch.rand(1).item()

    assert draw(1, 2, 0) == draw(1, 2, 0)
    assert len({draw(1, 2, 0), draw(1, 2, 1), draw(1, 3, 0), draw(2, 2, 0)}) == 4
