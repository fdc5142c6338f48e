"""Encoded images: the tower, the pooling and the projector run once for each image that is asked about."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.image_processing_flashsloth import normalize_pixels
from pipelines.serving.fused_siglip import FusedSiglip
from pipelines.serving.prompts import Prompt


class EncodedImage(NamedTuple):
    """Attributes: what EmbQ reads, float[T * P, V], and what stands in the sequence, float[T * R, D]."""

    patches: torch.Tensor
    tokens: torch.Tensor

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return self.patches.nbytes + self.tokens.nbytes


class ImageStore:
    """Encodes images in batches, and keeps those asked about last, up to a budget of bytes."""

    def __init__(self, model: FlashSlothForConditionalGeneration, budget_bytes: int) -> None:
        self.model = model
        self._tower = FusedSiglip(model.model.vision_tower)
        self.budget_bytes = budget_bytes
        self.num_bytes = 0
        self.num_encoded = 0
        self.num_hits = 0
        self._kept: OrderedDict[str, EncodedImage] = OrderedDict()

    def __contains__(self, key: str) -> bool:
        return key in self._kept

    def encode(self, prompts: Sequence[Prompt]) -> BaseModelOutputWithPooling | None:
        """The images of `prompts`, in order, as the model takes them; None where there is none."""
        keys = [prompt.image_key for prompt in prompts if prompt.image_key is not None]
        if not keys:
            return None
        known = {key: self._kept[key] for key in keys if key in self._kept}
        new = {p.image_key: p.pixel_values for p in prompts if p.image_key is not None and p.image_key not in known}
        self.num_hits += len(keys) - len(new)
        if new:
            known.update(zip(new, self._encode([pixels for pixels in new.values() if pixels is not None]), strict=True))
        images = [known[key] for key in keys]
        self._keep({key: known[key] for key in keys})
        return BaseModelOutputWithPooling(
            last_hidden_state=torch.stack([image.patches for image in images]),
            pooler_output=torch.stack([image.tokens for image in images]),
        )

    def clear(self) -> None:
        """Forget all images, to make room."""
        self._kept.clear()
        self.num_bytes = 0

    def _encode(self, images: list[np.ndarray]) -> list[EncodedImage]:
        tiles = normalize_pixels(torch.from_numpy(np.stack(images)).to(self.model.device)).to(self.model.dtype)
        patches = self._tower(tiles.flatten(0, 1)).unflatten(0, tiles.shape[:2])
        encoded = self.model.model.project_patches(patches)
        self.num_encoded += len(images)
        return [EncodedImage(*pair) for pair in zip(encoded.last_hidden_state, encoded.pooler_output, strict=True)]

    def _keep(self, used: dict[str, EncodedImage]) -> None:
        for key, image in used.items():
            if key not in self._kept:
                if image.num_bytes > self.budget_bytes:
                    continue
                # Of its own memory: a view would keep the whole batch that it was encoded in.
                self._kept[key] = EncodedImage(image.patches.clone(), image.tokens.clone())
                self.num_bytes += image.num_bytes
            self._kept.move_to_end(key)
        while self.num_bytes > self.budget_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.num_bytes -= oldest.num_bytes
