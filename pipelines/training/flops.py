"""How many floating-point operations a step needs, so that a log line can say how much of the chip it uses.

Model FLOPs: 2 for each multiply-add of the matrix products that the loss and its gradients need, at the true length of
each sample. Left out are padding, recomputation, zeros that stand for absent images, and everything element by element.
Attention counts whole, as in the usual definition of MFU (PaLM, appendix B), though half of it is masked. A product of
activations and weights counts once forward, once more where its input needs a gradient, and once more where its weights
learn. `tests/pipelines/test_training_flops.py` compares with what torch counts while it computes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch

from flashsloth import FlashSlothConfig

# Dense bf16 with fp32 accumulation, TFLOP/s, as the makers' data sheets state them.
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "A800": 312.0, "L40S": 362.0, "A10G": 70.0, "L4": 121.0}


class Flops(NamedTuple):
    """Operations by part: `vision` is tower, pooling and projector, `language` all others."""

    vision: float
    language: float


class FlopCounter:
    """Counts micro-batches of one model.

    Args:
        config: The model's shape.
        train_parts: The parts that learn, as in `pipelines.training.settings`; none for a forward pass alone.
        features: Whether images come as patch features, so that the tower never runs.
    """

    def __init__(self, config: FlashSlothConfig, train_parts: Collection[str], features: bool = False) -> None:
        self._config = config
        self._learn = set(train_parts)
        # Whether what enters a part needs a gradient: it does from the first part that learns on.
        self._patches_need = "vision_tower" in self._learn and not features
        self._hidden_need = bool(self._learn)
        self._image = self._vision_of_an_image(features)

    def count(self, inputs: Mapping[str, torch.Tensor]) -> Flops:
        """The operations of a micro-batch, forward and backward, given what the model takes."""
        lengths, queries, images = _samples(inputs, self._config)
        per_image = self._config.num_image_tokens
        language = sum(self._language(length) for length in lengths)
        language += sum(
            self._embedded_query(length, asked)
            for length, asked, image in zip(lengths, queries, images, strict=True)
            if image
        )
        return Flops(self._image * sum(images) / per_image, language)

    def _passes(self, part: str, input_needs: bool) -> int:
        return 1 + (part in self._learn) + input_needs

    def _vision_of_an_image(self, features: bool) -> float:
        config, vision = self._config, self._config.vision_config
        patches, width, text = config.num_patches, vision.hidden_size, config.text_config.hidden_size
        learns = "vision_tower" in self._learn
        embedding = 2 * patches * width * vision.num_channels * vision.patch_size**2 * (1 + learns)
        weights = 2 * patches * (4 * width**2 + 2 * width * vision.intermediate_size)
        attention = 2 * 2 * patches**2 * width
        tower = embedding + vision.num_hidden_layers * (weights + attention) * (3 if learns else 1)
        pooling = 2 * patches * width**2 * self._passes("pooling", self._patches_need)
        pooling += 2 * patches * width * self._passes("pooling", "pooling" in self._learn or self._patches_need)
        pooled_need = "pooling" in self._learn or self._patches_need
        tokens = patches // config.pooling_size**2
        projector = 2 * tokens * width * text * self._passes("projector", pooled_need)
        projector += 2 * tokens * text**2 * self._passes("projector", pooled_need or "projector" in self._learn)
        return config.num_tiles * ((0 if features else tower) + pooling + projector)

    def _language(self, length: int) -> float:
        text = self._config.text_config
        width, passes = text.hidden_size, self._passes("language_model", self._hidden_need)
        weights = 2 * length * (4 * width**2 + 2 * width * text.intermediate_size) * passes
        attention = 2 * 2 * length**2 * width * (3 if self._hidden_need else 1)
        return text.num_hidden_layers * (weights + attention) + 2 * length * width * text.vocab_size * passes

    def _embedded_query(self, length: int, queries: int) -> float:
        config = self._config
        text, vision, inner = config.text_config.hidden_size, config.vision_config.hidden_size, config.query_hidden_size
        patches = config.num_tiles * config.num_patches
        outer = self._passes("embedded_query", self._hidden_need)
        of_patches = self._passes("embedded_query", self._patches_need)
        inside = self._passes("embedded_query", self._hidden_need)
        keys = self._passes("embedded_query", self._patches_need or "embedded_query" in self._learn)
        total = 2 * length * text * inner * outer
        total += 2 * inner**2 * (queries + 2 * length) * inside
        total += 2 * patches * vision * inner * of_patches + 2 * patches * inner**2 * keys
        total += 2 * patches * vision**2 * of_patches
        total += 2 * inner**2 * queries * inside + 2 * queries * vision * text * inside
        products = 3 if self._hidden_need else 1
        keys_need = self._patches_need or "embedded_query" in self._learn
        total += 2 * 2 * queries * length * inner * products
        # Where nothing behind the keys or values learns, no gradient goes to them.
        total += 2 * queries * patches * (inner + vision) * (1 + (self._hidden_need + keys_need))
        return total


def _samples(inputs: Mapping[str, torch.Tensor], config: FlashSlothConfig) -> tuple[list[int], list[int], list[int]]:
    """Length, query tokens and image tokens of each sample, in lines of one or of several samples."""
    ids = inputs["input_ids"]
    if "attention_mask" in inputs:
        mask = inputs["attention_mask"] > 0
        number = torch.arange(len(ids))[:, None].expand_as(ids)
    else:  # packed: a sample begins where positions begin anew; what begins with padding is padding
        starts = inputs["position_ids"] == 0
        number = starts.flatten().cumsum(0).view_as(ids) - 1
        padding = -1 if config.pad_token_id is None else config.pad_token_id
        mask = torch.ne(ids[starts], padding)[number]
    held, number = ids[mask], number[mask]
    count = int(number.max()) + 1
    chosen = (torch.ones_like(held, dtype=torch.bool), held == config.query_token_id, held == config.image_token_id)
    lengths, queries, images = (torch.bincount(number[each], minlength=count).tolist() for each in chosen)
    return lengths, queries, images


def peak_tflops(device: torch.device) -> float | None:
    """What the maker states for this GPU, or None where the table has no such GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for chip, peak in PEAK_TFLOPS.items() if chip in name), None)
