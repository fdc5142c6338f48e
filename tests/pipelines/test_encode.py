"""The frozen tower: what it does when memory or the device fails, and which towers count as the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from flashsloth import FlashSlothForConditionalGeneration
from pipelines.encode import EncoderError, NotEncoded, PatchEncoder, encoder_facts


class FailingTower(torch.nn.Module):
    """A tower that first asks `fails` whether to raise, which a CPU never would by itself."""

    def __init__(self, tower: torch.nn.Module, fails: Callable[[torch.Tensor], Exception | None]) -> None:
        super().__init__()
        self.tower, self.fails = tower, fails
        self.batches: list[int] = []

    def forward(self, pixels: torch.Tensor) -> Any:
        self.batches.append(len(pixels))
        error = self.fails(pixels)
        if error is not None:
            raise error
        return self.tower(pixels)


@pytest.fixture
def encoder(tiny_checkpoint: Path) -> PatchEncoder:
    return PatchEncoder(str(tiny_checkpoint), batch_size=8)


def pixels(count: int, tiles: int = 1) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, tiles, 3, 126, 126), dtype=np.uint8)


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def test_out_of_memory_halves_the_batch_and_changes_nothing(encoder: PatchEncoder) -> None:
    images = pixels(11)
    expected = encoder(images)
    encoder.tower = FailingTower(encoder.tower, lambda batch: out_of_memory() if len(batch) > 3 else None)
    encoded = encoder(images)
    assert encoder.tower.batches == [8, 4, 2, 2, 2, 2, 2, 1]
    for features, reference in zip(encoded, expected, strict=True):
        np.testing.assert_allclose(features, reference, atol=2e-3)
    encoder(images[:4])
    assert encoder.tower.batches[8:] == [2, 2]  # it has learned


def test_image_that_does_not_fit_alone_harms_no_other(encoder: PatchEncoder) -> None:
    """Two tiles an image; one tile of image 2 is white, which this tower cannot take."""
    images = pixels(4, tiles=2)
    expected = encoder(images)
    images[2, 1] = 255
    encoder.tower = FailingTower(
        encoder.tower, lambda batch: out_of_memory() if bool((batch == 1).all(dim=(1, 2, 3)).any()) else None
    )
    encoded = encoder(images)
    assert isinstance(encoded[2], NotEncoded) and encoded[2].reason == "encoder_out_of_memory"
    for number in (0, 1, 3):
        np.testing.assert_allclose(encoded[number], expected[number], atol=2e-3)


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors might"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasSgemm"),
    ],
)
def test_device_failure_names_the_tower(encoder: PatchEncoder, tiny_checkpoint: Path, error: RuntimeError) -> None:
    encoder.tower = FailingTower(encoder.tower, lambda batch: error)
    with pytest.raises(EncoderError, match=f"the tower of {tiny_checkpoint} failed on cpu: CUDA error: ") as raised:
        encoder(pixels(1))
    assert "\n" not in str(raised.value)


def test_fault_of_the_program_is_not_taken_for_the_devices(encoder: PatchEncoder) -> None:
    with pytest.raises(RuntimeError, match="channels"):
        encoder(pixels(1)[:, :, :2])


def test_identity_is_the_towers_wherever_and_however_it_is_stored(
    tmp_path: Path, tiny_model: FlashSlothForConditionalGeneration, tiny_checkpoint: Path
) -> None:
    facts = encoder_facts(str(tiny_checkpoint))
    assert (facts.image_size, facts.num_patches, facts.width) == (126, 81, 48)
    tiny_model.model.projector.linear_1.weight.data.add_(1.0)  # trained since, but not the tower
    tiny_model.to(torch.bfloat16).save_pretrained(tmp_path / "trained")
    assert encoder_facts(str(tmp_path / "trained")) == facts
    next(tiny_model.model.vision_tower.parameters()).data.mul_(2.0)
    tiny_model.save_pretrained(tmp_path / "tuned")
    assert encoder_facts(str(tmp_path / "tuned")).identity != facts.identity


def test_siglip_and_its_tower_in_a_checkpoint_are_one(
    tmp_path: Path, tiny_model: FlashSlothForConditionalGeneration
) -> None:
    """A SigLIP has one layer more than the tower of FlashSloth, a last norm and a head."""
    tower = tiny_model.model.vision_tower
    layers = tower.config.num_hidden_layers
    config = SiglipVisionConfig(**tower.config.to_dict() | {"num_hidden_layers": layers + 1, "vision_use_head": True})
    siglip = SiglipVisionModel(config)
    siglip.load_state_dict(tower.state_dict(), strict=False)
    siglip.save_pretrained(tmp_path / "siglip")
    tiny_model.save_pretrained(tmp_path / "model")
    assert encoder_facts(str(tmp_path / "siglip")) == encoder_facts(str(tmp_path / "model"))
