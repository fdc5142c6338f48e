"""Features in 8 bits: their bounds, how they are stored, and what they cost a model next to what they save."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from pipelines.feature_error import measure_int8
from pipelines.shards import ShardedDataset
from pipelines.shards.quantization import dequantize, quantize
from tests.corpus import write_corpus, write_processor
from tests.preparation import prepare_here, prepare_settings


@pytest.mark.parametrize("spread", [1e-6, 1e-3, 1.0, 300.0, 60000.0])
def test_error_is_half_a_step_of_the_tokens_own_scale(spread: float) -> None:
    rng = np.random.default_rng(0)
    features = np.clip(rng.standard_normal((2, 9, 64)) * spread, -65000, 65000).astype(np.float16)
    features[0, 0] = 0
    features[0, 1] *= 0.01  # a small token beside large ones
    numbers, scales = quantize(features)
    assert (numbers.dtype, scales.dtype) == (np.int8, np.float16)
    assert numbers.shape == features.shape and scales.shape == features.shape[:-1]
    back = dequantize(numbers, scales)
    assert back.dtype == np.float16 and np.isfinite(back).all()
    step = scales.astype(np.float32)[..., None]
    rounding = np.abs(features.astype(np.float32)) * 2**-11 + 2**-25  # of the float16 that comes back
    error = np.abs(back.astype(np.float32) - features.astype(np.float32))
    assert (error <= 0.5001 * step + rounding).all()
    assert (step.squeeze(-1) <= np.abs(features).max(-1).astype(np.float32) / 127 * 1.002 + 6e-8).all()


@pytest.mark.parametrize("largest", [65504, 65472, 60000])
def test_the_largest_features_stay_finite(largest: float) -> None:
    features = np.array([[[largest, -largest, 1.0]]], np.float16)
    back = dequantize(*quantize(features)).astype(np.float32)
    np.testing.assert_allclose(back[0, 0, :2], [largest, -largest], rtol=1 / 127)


def test_int8_features_are_stored_small_and_read_back(tmp_path: Path, tiny_checkpoint: Path) -> None:
    write_corpus(tmp_path, 8)
    datasets = {}
    for dtype in ("float16", "int8"):
        encoder = {"path": str(tiny_checkpoint), "dtype": dtype}
        output = str(tmp_path / dtype)
        settings = prepare_settings(
            tmp_path, output=output, processor=str(tiny_checkpoint), payload="features", encoder=encoder
        )
        manifest = prepare_here(settings)
        assert (manifest.image_dtype, manifest.image_shape) == (dtype, [1, 81, 48])
        datasets[dtype] = ShardedDataset(output)
    for index in range(8):
        exact, coarse = (datasets[dtype].read(index).get("patch_features") for dtype in ("float16", "int8"))
        assert (exact is None) == (coarse is None) == (index % 4 == 3)
        if exact is not None:
            assert coarse.dtype == np.float16
            np.testing.assert_array_equal(coarse, dequantize(*quantize(exact)))
            coarse += 1  # the caller's own
    shard = pa.ipc.open_file(tmp_path / "int8" / datasets["int8"].manifest.shards[0].name)
    row = shard.get_batch(0)
    assert len(row["image"][0].as_buffer()) == 81 * 48
    assert len(row["image_scales"][0].as_buffer()) == 81 * 2


def test_int8_costs_the_model_little_for_half_the_room(tmp_path: Path, tiny_checkpoint: Path) -> None:
    write_corpus(tmp_path, 32)
    encoder = {"path": str(tiny_checkpoint)}
    prepare_here(prepare_settings(tmp_path, processor=str(tiny_checkpoint), payload="features", encoder=encoder))
    model = FlashSlothForConditionalGeneration.from_pretrained(tiny_checkpoint).eval()
    processor = FlashSlothProcessor.from_pretrained(tiny_checkpoint)
    error = measure_int8(model, processor, ShardedDataset(str(tmp_path / "out")))
    print(error)
    assert error.rows == 24
    assert error.bytes_share == pytest.approx((48 + 2) / 96)
    assert 0 < error.feature_error < 0.02
    assert 0 < abs(error.loss_change) < 1e-3


def test_error_is_measured_against_float16_only(tmp_path: Path, tiny_checkpoint: Path) -> None:
    write_corpus(tmp_path, 4)
    write_processor(tmp_path)
    prepare_here(prepare_settings(tmp_path))
    model = FlashSlothForConditionalGeneration.from_pretrained(tiny_checkpoint)
    processor = FlashSlothProcessor.from_pretrained(tiny_checkpoint)
    with pytest.raises(ValueError, match="holds pixels of uint8; the error of int8 is measured against features of"):
        measure_int8(model, processor, ShardedDataset(str(tmp_path / "out")))
