"""The arithmetic of memory: its activations are what a step allocates, its stages what real GPUs hold."""

from __future__ import annotations

import functools
import re
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration
from pipelines.training.forecast import forecast
from pipelines.training.lora import add_adapters
from pipelines.training.memory import MemoryPlanError, Sizes, Work, choose_stage, count_sizes, estimate
from pipelines.training.optimization import freeze
from pipelines.training.settings import TrainSettings
from pipelines.training.start import build_learner, load_processor
from tests.prepared import coloured_rows, model_batch
from tests.training import PARTS, RECIPES, published_recipe, recipe, write_data

GIB = 2**30
WIDE = {
    "vision_config": {"hidden_size": 96, "intermediate_size": 360, "num_hidden_layers": 6},
    "text_config": {"hidden_size": 80, "intermediate_size": 320, "num_hidden_layers": 8, "vocab_size": 3000},
    "query_hidden_size": 24,
}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_data(tmp_path_factory.mktemp("prepared"))


class Allocations(TorchDispatchMode):
    """The most bytes that tensors take at once while it is active, weights and gradients aside."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        tensors = [each for each in model.parameters()] + [each.grad for each in model.parameters()]
        self._known = {each.untyped_storage()._cdata for each in tensors if each is not None}
        self._now = 0
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                self._known.add(storage._cdata)
                self._now += storage.nbytes()
                self.peak = max(self.peak, self._now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._now -= size


@pytest.mark.parametrize(
    ("learn", "checkpointing", "precision"),
    [
        *((learn, how, "fp32") for learn in ("hd", "instruct", "align", "lora") for how in ("off", "full")),
        ("hd", "selective", "fp32"),
        ("lora", "selective", "fp32"),
        ("hd", "full", "bf16"),
        ("instruct", "selective", "bf16"),
        ("align", "off", "bf16"),
    ],
)
def test_activations_are_what_a_step_allocates(
    prepared: Any, tmp_path: Any, learn: str, checkpointing: str, precision: str
) -> None:
    settings = recipe(
        prepared,
        tmp_path,
        model__gradient_checkpointing=checkpointing,
        model__overrides=WIDE,
        train_parts={"hd": PARTS, "align": ["pooling", "projector"]}.get(learn, PARTS[1:]),
        lora={"rank": 8, "dropout": 0.1} if learn == "lora" else None,
        precision=precision,
    )
    processor = load_processor(settings.model)
    model = build_learner(settings, processor)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    rows = model_batch(processor, coloured_rows(1, turns=6))
    with Allocations(model) as allocations:
        inputs = {name: each.repeat(8, *[1] * (each.dim() - 1)) for name, each in rows.items()}
        model(**inputs, use_cache=False).loss.backward()
    work = Work(inputs["input_ids"].numel(), 8, int((inputs["labels"] != -100).sum()))
    expected = estimate(settings, model.config, count_sizes(model), work, 1, 1).activations
    assert expected == pytest.approx(allocations.peak, rel=0.08)


@pytest.mark.parametrize("checkpointing", ["off", "selective", "full"])
def test_a_frozen_tower_has_no_backward_pass(prepared: Any, tmp_path: Any, checkpointing: str) -> None:
    """transformers makes the embeddings ask for gradients where it checkpoints, and with them whole frozen towers."""
    settings = recipe(
        prepared, tmp_path, model__gradient_checkpointing=checkpointing, train_parts=["pooling", "projector"]
    )
    processor = load_processor(settings.model)
    model = build_learner(settings, processor)
    patches = model.get_patch_features(model_batch(processor, coloured_rows(1))["pixel_values"])
    assert not patches.requires_grad


def full_size(name: str) -> tuple[TrainSettings, FlashSlothConfig, Sizes]:
    """A recipe, and the model that it trains at full size."""
    return published_recipe(name), *_counted(name)


@functools.cache
def _counted(name: str) -> tuple[FlashSlothConfig, Sizes]:
    settings = published_recipe(name)
    config = FlashSlothConfig.hd() if settings.model.tiling == "hd" else FlashSlothConfig.base()
    with torch.device("meta"):
        model = FlashSlothForConditionalGeneration(config)
        if settings.lora:
            add_adapters(model, settings.lora)
    freeze(model, settings.train_parts)
    return config, count_sizes(model)


@pytest.mark.parametrize(
    ("name", "learning", "length", "peaks"),
    [
        ("align", 10_837_249, 256, (12, 12, 9)),
        ("instruct", 2_798_628_545, 1024, (28, 24, 20)),
        ("instruct", 2_798_628_545, 3072, (53, 48, 45)),
        ("instruct-hd", 3_196_373_985, 1024, (22, 16, 13)),
        ("instruct-hd", 3_196_373_985, 3072, (28, 22, 19)),
        ("instruct-lora", 207_688_385, 1024, (20, 20, 16)),
        ("instruct-lora", 207_688_385, 3072, (45, 44, 40)),
    ],
)
def test_the_recipes_say_what_they_need_and_take_the_stage_that_fits(
    name: str, learning: int, length: int, peaks: tuple[int, int, int]
) -> None:
    settings, config, sizes = full_size(name)
    added = learning - 18_944_705 if settings.lora else 0
    assert sizes == (3_196_373_985 + added, learning)
    tokens = settings.batch.micro_size * length
    work = Work(tokens, settings.batch.micro_size, tokens)
    found = [round(estimate(settings, config, sizes, work, stage, 8).peak / GIB) for stage in (1, 2, 3)]
    assert found == list(peaks)
    comment = " ".join(line.lstrip("# ") for line in _recipe_text(name).splitlines() if line.startswith("#"))
    assert ", ".join(map(str, peaks)) in comment
    plan = choose_stage(settings, config, sizes, work, 8, 78 * GIB)
    assert plan.stage == 1 and "WARNING" not in plan.reason


def _recipe_text(name: str) -> str:
    return (RECIPES / f"{name}.yaml").read_text()


def test_states_are_counted_by_the_table() -> None:
    settings, config, sizes = full_size("instruct")
    work = Work(1024, 1, 1024)
    by_stage = {stage: estimate(settings, config, sizes, work, stage, 8) for stage in (1, 2, 3)}
    total, learning = sizes
    assert by_stage[1].states == pytest.approx(2 * total + 2 * learning + 12 * learning / 8, abs=2)
    assert by_stage[2].states == pytest.approx(2 * total + 14 * learning / 8, abs=2)
    assert by_stage[3].states == pytest.approx(2 * total / 8 + 14 * learning / 8, abs=2)
    settings.deepspeed.offload = "optimizer"
    assert estimate(settings, config, sizes, work, 2, 8).states == pytest.approx(2 * total + 2 * learning / 8, abs=2)


def test_smaller_gpus_take_higher_stages_and_what_never_fits_is_refused_in_numbers() -> None:
    settings, config, sizes = full_size("instruct")
    work = Work(8 * 1024, 8, 8 * 1024)
    assert [choose_stage(settings, config, sizes, work, 8, gib * GIB).stage for gib in (39, 22, 18)] == [1, 2, 3]
    tight = choose_stage(settings, config, sizes, Work(16 * 3072, 16, 16 * 3072), 8, 39 * GIB)
    assert tight.stage == 3 and "WARNING: that may not be enough" in tight.reason and "39.0 GiB" in tight.reason
    with pytest.raises(MemoryPlanError, match=r"ZeRO-3 on 1 worker needs 42.4 GiB .* smallest GPU has 39.0 GiB: use"):
        choose_stage(settings, config, sizes, work, 1, 39 * GIB)
    settings.deepspeed.stage = 2  # named: taken, and measured as well
    assert choose_stage(settings, config, sizes, work, 8, 78 * GIB).stage == 2
    assert choose_stage(settings, config, sizes, work, 8, None).reason.startswith("ZeRO-2: about ")
    with pytest.raises(MemoryPlanError, match=r"ZeRO-2 on 8 workers needs 10\.5 GiB"):
        choose_stage(settings, config, sizes, work, 8, 10 * GIB)


def test_the_forecast_knows_the_longest_rows(prepared: Any, tmp_path: Any) -> None:
    settings = recipe(prepared, tmp_path, scaling__num_workers=[1, 2])
    lines = forecast(settings).splitlines()
    assert re.search(r"has \d+ tokens, \d+ of them learned, and 2 images", lines[0])
    # One worker who keeps fp32 weights has nobody to share with.
    assert [line.split()[:2] for line in lines[3:]] == [
        *(["1", stage] for stage in "02"),  # 2 is the recipe's
        *(["2", stage] for stage in "123"),
    ]
    assert all(line.endswith("24 GB, 40 GB, 48 GB, 80 GB, 141 GB") for line in lines[3:])
