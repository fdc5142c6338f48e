"""The frozen vision tower over batches of images: what the payload `features` stores."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from flashsloth.backbones import load_vision_tower
from flashsloth.image_processing_flashsloth import normalize_pixels
from pipelines.device_errors import DeviceError

# What of a tower's configuration decides its output. The rest (names, versions, dtypes) differs between equal towers.
_SHAPE_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_channels"),
    *("image_size", "patch_size", "hidden_act", "layer_norm_eps"),
)


class EncoderError(DeviceError):
    """It failed under the tower."""


@dataclass(frozen=True)
class NotEncoded:
    """Why an image has no features."""

    reason: str
    """`encoder_out_of_memory` or `non_finite`."""
    detail: str


class PatchEncoder:
    """Pixels -> patch features. On a GPU in bfloat16, on a CPU in float32; float16 comes out either way.

    Where the memory does not suffice the batch is halved, for this call and all that follow, down to single tiles.

    Args:
        path: a FlashSloth checkpoint or a SigLIP, a folder or a hub id.
        batch_size: tiles in one forward pass.

    Attributes:
        tower: float[B, 3, H, W] -> an output with `last_hidden_state` float[B, P, D].
    """

    def __init__(self, path: str, batch_size: int) -> None:
        self.path = path
        self.batch_size = batch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.tower: torch.nn.Module = load_vision_tower(path, self.dtype).to(self.device)

    def __call__(self, pixels: np.ndarray) -> list[np.ndarray | NotEncoded]:
        """uint8[N, T, 3, H, W] -> for each of N images its float16[T, P, D], or why it has none.

        Raises:
            EncoderError: the accelerator failed otherwise than for want of memory. This process cannot go on using it.
        """
        num_images, num_tiles = pixels.shape[:2]
        try:
            encoded = self._encode(torch.from_numpy(pixels).flatten(0, 1))
        except RuntimeError as error:
            if not is_device_failure(error):
                raise
            raise EncoderError(
                f"encoder: the tower of {self.path} failed on {self.device}: {_first_line(error)}"
            ) from error
        return [self._image(encoded[row * num_tiles : (row + 1) * num_tiles]) for row in range(num_images)]

    def _encode(self, tiles: torch.Tensor) -> list[torch.Tensor | None]:
        """Features of each tile; None where even a tile alone is too much."""
        encoded: list[torch.Tensor | None] = []
        while len(encoded) < len(tiles):
            part = tiles[len(encoded) : len(encoded) + self.batch_size]
            features = self._forward(part)
            if features is not None:
                encoded += features
            elif len(part) == 1:
                encoded.append(None)
            else:
                self.batch_size = len(part) // 2
        return encoded

    @torch.inference_mode()
    def _forward(self, tiles: torch.Tensor) -> torch.Tensor | None:
        try:
            pixels = normalize_pixels(tiles.to(self.device)).to(self.dtype)
            return self.tower(pixels).last_hidden_state.to(torch.float16).cpu()
        except torch.OutOfMemoryError:
            pass
        # Out here the exception is gone, and with it the tensors that its traceback kept alive.
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return None

    def _image(self, tiles: list[torch.Tensor | None]) -> np.ndarray | NotEncoded:
        done = [tile for tile in tiles if tile is not None]
        if len(done) < len(tiles):
            return NotEncoded("encoder_out_of_memory", f"{self.device} has no room for a single tile of this image")
        features = torch.stack(done).numpy()
        bad = np.count_nonzero(~np.isfinite(features))
        return NotEncoded("non_finite", f"{bad} of {features.size} features") if bad else features


@dataclass(frozen=True)
class EncoderFacts:
    """What a dataset of features must know of the tower that made them."""

    identity: str
    """sha256 of the tower's shape and its weights in bfloat16: the same for a SigLIP and for any checkpoint that holds
    it unchanged, in whatever precision it is stored."""
    image_size: int
    num_patches: int
    width: int


def encoder_facts(path: str) -> EncoderFacts:
    """The facts of the tower at `path`, a FlashSloth checkpoint or a SigLIP: a folder or a hub id."""
    tower = load_vision_tower(path, torch.bfloat16)
    config = tower.config
    digest = hashlib.sha256(repr([(field, getattr(config, field)) for field in _SHAPE_FIELDS]).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.int16).numpy().tobytes())
    return EncoderFacts(
        identity=digest.hexdigest(),
        image_size=config.image_size,
        num_patches=(config.image_size // config.patch_size) ** 2,
        width=config.hidden_size,
    )


def is_device_failure(error: RuntimeError) -> bool:
    """Whether it tells of the accelerator and not of the program or of want of memory."""
    # cuBLAS and cuDNN report through a plain RuntimeError.
    return isinstance(error, torch.AcceleratorError) or any(
        word in str(error) for word in ("CUDA error", "CUDNN_STATUS")
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
