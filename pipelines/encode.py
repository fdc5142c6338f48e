"""The frozen vision tower over batches of images: what the payload `features` stores."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch

from flashsloth.backbones import load_vision_tower
from flashsloth.image_processing_flashsloth import normalize_pixels


class PatchEncoder:
    """Pixels -> patch features. On a GPU in bfloat16, on a CPU in float32; stored as float16 either way.

    Args:
        path: a FlashSloth checkpoint or a SigLIP, a folder or a hub id.
        batch_size: tiles in one forward pass.
    """

    def __init__(self, path: str, batch_size: int) -> None:
        self.batch_size = batch_size
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        self.tower = load_vision_tower(path, self.dtype).to(self.device)

    @torch.inference_mode()
    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        """uint8[N, T, 3, H, W] -> float16[N, T, P, D]. A value that float16 cannot hold comes out infinite."""
        num_images, num_tiles = pixels.shape[:2]
        tiles = torch.from_numpy(pixels).flatten(0, 1)
        features = [
            self.tower(normalize_pixels(part.to(self.device)).to(self.dtype)).last_hidden_state.to(torch.float16).cpu()
            for part in tiles.split(self.batch_size)
        ]
        return torch.cat(features).unflatten(0, (num_images, num_tiles)).numpy()


@dataclass(frozen=True)
class EncoderFacts:
    """What a dataset of features must know of the tower that made them."""

    identity: str
    """sha256 of the tower's configuration and weights, wherever they are stored."""
    image_size: int
    num_patches: int
    width: int


def encoder_facts(path: str) -> EncoderFacts:
    """The facts of the tower at `path`, a FlashSloth checkpoint or a SigLIP: a folder or a hub id."""
    tower = load_vision_tower(path)
    digest = hashlib.sha256(tower.config.to_json_string(use_diff=False).encode())
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.numpy().tobytes())
    config = tower.config
    return EncoderFacts(
        identity=digest.hexdigest(),
        image_size=config.image_size,
        num_patches=(config.image_size // config.patch_size) ** 2,
        width=config.hidden_size,
    )
