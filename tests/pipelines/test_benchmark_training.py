"""What the benchmark of training measures against: it must compute the same, and draw what it says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.activations import NewGELUActivation

from flashsloth.collation import collate
from pipelines.benchmarks.bare_loop import bare_steps
from pipelines.benchmarks.conversations import MAX_LENGTH, draw_shapes, sample_of, write_folder
from pipelines.benchmarks.feeding import feed_alone, measure_padding
from pipelines.benchmarks.full_size import draw_captions, measure_full_size, recipe_settings
from pipelines.benchmarks.published import published_parts, published_shares, zero_image_pass
from pipelines.benchmarks.sizes import TRAIN_PARTS
from pipelines.benchmarks.step import VARIANTS
from pipelines.benchmarks.timed_steps import time_steps
from pipelines.feed import PreparedRows, TokenBudget
from tests.pipelines.test_training_variants import plain_losses
from tests.training import recipe, write_data

FEW = 12
PARTS = ("pooling", "queries", "activation", "attention")


@pytest.fixture
def batch(processor) -> dict[str, torch.Tensor]:
    """Conversations of the mix, with and without an image; lengths as drawn for 9 image tokens."""
    random = np.random.default_rng(0)
    shapes = [shape for shape in draw_shapes(200, seed=1, image_tokens=9) if len(shape.questions) < 5]
    chosen = [shape for shape in shapes if shape.has_image][:4] + [shape for shape in shapes if not shape.has_image][:1]
    samples = [sample_of(shape, processor, random) for shape in chosen]
    assert [len(s["input_ids"]) for s in samples] == [shape.num_tokens(9, 9) for shape in chosen]
    for sample, shape in zip(samples, chosen, strict=True):
        if shape.has_image:
            sample["pixel_values"] = random.standard_normal((1, 3, 126, 126)).astype(np.float32)
    return collate(samples, processor.pad_token_id)


def loss_and_gradients(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return loss.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("parts", [{"pooling"}, {"queries"}, {"activation"}, {"attention"}, set(PARTS)])
def test_the_restated_parts_compute_what_ours_do(tiny_model, batch, parts):
    loss, gradients = loss_and_gradients(tiny_model, batch)
    with published_parts(tiny_model, **{name: name in parts for name in PARTS}):
        other_loss, others = loss_and_gradients(tiny_model, batch)
    torch.testing.assert_close(other_loss, loss, atol=1e-5, rtol=0)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, atol=1e-4, rtol=1e-4, msg=name)


def test_the_parts_are_ours_again_afterwards_and_loop_meanwhile(tiny_model, batch):
    scored: list[int] = []
    tiny_model.model.pooling.score_in.register_forward_hook(lambda *_: scored.append(1))
    language_model = tiny_model.model.language_model
    own = language_model.config._attn_implementation, language_model.layers[0].mlp.activation_fn
    with torch.no_grad():
        with published_parts(tiny_model, True, False, True, True):
            tiny_model(**batch)
            assert language_model.config._attn_implementation == "sdpa"
            assert isinstance(language_model.layers[0].mlp.activation_fn, NewGELUActivation)
        assert len(scored) == 9, "once for each region of 126 pixels"
        tiny_model(**batch)
    assert len(scored) == 10
    assert own == (language_model.config._attn_implementation, language_model.layers[0].mlp.activation_fn)


def test_zero_images_change_no_loss(tiny_model, batch):
    with torch.no_grad():
        assert float(zero_image_pass(tiny_model, batch["pixel_values"], 3)) == 0.0


def test_the_published_sampler_gives_every_rank_long_and_short_rows():
    lengths = np.sort(np.random.default_rng(0).integers(100, 2000, 32))
    shares = published_shares(lengths, micro_batch=8, world_size=4)
    assert sorted(np.concatenate(shares).tolist()) == list(range(32))
    assert [len(share) for share in shares] == [8] * 4
    assert all(lengths[share].max() > 1500 and lengths[share].min() < 500 for share in shares)


def test_lengths_are_drawn_as_described():
    shapes = draw_shapes(4000, seed=0)
    lengths = np.array([shape.num_tokens(81, 9) for shape in shapes])
    assert lengths.max() <= MAX_LENGTH
    assert sum(not shape.has_image for shape in shapes) / 4000 == pytest.approx(40 / 664, abs=0.01)
    assert np.mean([len(shape.questions) for shape in shapes]) == pytest.approx(5.5, abs=0.4)
    assert shapes == draw_shapes(4000, seed=0) != draw_shapes(4000, seed=1)


def test_padding_is_within_its_bounds_on_a_few_rows_too():
    _, bounds, found = measure_padding(4000, seed=3)
    assert all(bound.is_met for bound in bounds), found
    assert found["published sampler, 16 rows"] > 5 * found["8192 tokens"] > 5 * found["packed to 4096"]


def test_the_feed_is_timed_over_rows_that_are_really_read(tmp_path, processor):
    shapes = draw_shapes(FEW, seed=0, image_tokens=9)
    folder = write_folder(tmp_path / "rows", shapes, processor, seed=0)
    rows = PreparedRows([folder])
    assert rows.num_tokens.tolist() == [shape.num_tokens(9, 9) for shape in shapes]
    assert rows.num_loss_tokens.tolist() == [sum(shape.answers) + len(shape.answers) for shape in shapes]
    assert rows.has_image.tolist() == [shape.has_image for shape in shapes]
    figures = feed_alone(rows, processor, 4, TokenBudget(8000), threads=2)
    assert figures["rows_per_s"] == pytest.approx(FEW / figures["seconds"])
    (tmp_path / "rows" / rows.datasets[0].manifest.shards[0].name).unlink()
    with pytest.raises(ValueError, match="found no such file"):
        feed_alone(PreparedRows([folder]), processor, 4, 2, threads=1)


def test_the_variants_go_from_published_to_ours_one_change_at_a_time():
    changed = [
        sum(vars(before)[name] != vars(after)[name] for name in vars(before))
        for before, after in zip(list(VARIANTS.values()), list(VARIANTS.values())[1:], strict=False)
    ]
    assert changed == [1] * 8 and not any(vars(VARIANTS["ours"]).values())


def test_the_bare_loop_computes_what_a_run_does(tmp_path):
    packed = {"batch__max_tokens": 400, "batch__pack_to": 200, "train_parts": TRAIN_PARTS}
    settings = recipe(write_data(tmp_path), tmp_path, scaling__num_workers=1, **packed)
    np.testing.assert_allclose(list(bare_steps(settings)), plain_losses(settings), rtol=1e-5)


def test_a_recipe_at_full_size_is_timed_part_by_part(tmp_path: Path) -> None:
    settings = recipe_settings(tmp_path, "instruct-hd", 0, on_gpu=False, quick=True)
    assert settings.train_parts[0] == "vision_tower" and settings.precision == "bf16"  # as the recipe says
    found = time_steps(settings)
    figures, parts = found["figures"], found["parts"]
    assert 0 < figures["mfu_vision"] < figures["mfu"] < 1 and figures["samples_per_s"] > 0
    assert 0 < parts["of it the tower"] < parts["forward pass"] < parts["step"]
    named = sum(parts[name] for name in ("forward pass", "backward pass", "update", "wait for data"))
    assert 0.5 * parts["step"] < named <= parts["step"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_full_size_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs a GPU; --quick shows that it runs"):
        measure_full_size(tmp_path, 0, quick=False)


def test_captions_are_short_and_have_a_picture_each() -> None:
    shapes = draw_captions(500, 0)
    assert shapes == draw_captions(500, 0) and all(shape.has_image and len(shape.answers) == 1 for shape in shapes)
    assert np.mean([shape.answers[0] for shape in shapes]) == pytest.approx(14, rel=0.1)
