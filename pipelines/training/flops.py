"""How many floating-point operations a step needs, so that a log line can say how much of the chip it uses.

Model FLOPs: 2 for each multiply-add of the matrix products that the loss and its gradients need, at the true length of
each sample; the head's at the tokens that are learned. Left out are padding, recomputation, zeros that stand for absent
images, and everything element by element.
Attention counts whole, as in the usual definition of MFU (PaLM, appendix B), though half of it is masked. A product of
activations and weights counts once forward, once more where its input needs a gradient, and once more where its weights
learn. `tests/pipelines/test_training_flops.py` compares with what torch counts while it computes.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch

from flashsloth import FlashSlothConfig
from pipelines.training.model_settings import LoraSettings

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
        lora: The adapters of the language model, where it learns through them.
    """

    def __init__(
        self,
        config: FlashSlothConfig,
        train_parts: Collection[str],
        features: bool = False,
        lora: LoraSettings | None = None,
    ) -> None:
        self._config = config
        self._learn = set(train_parts)
        self._adapters = lora if "language_model" in self._learn else None
        if self._adapters:
            self._learn.remove("language_model")  # its own weights stay
        # Whether what enters a part needs a gradient: it does from the first part that learns on.
        self._patches_need = "vision_tower" in self._learn and not features
        parts_before = {"pooling", "projector", "query_tokens", "language_model"}
        self._embeds_need = self._patches_need or bool(parts_before & self._learn)
        self._image = self._vision_of_an_image(features)

    def count(self, inputs: Mapping[str, torch.Tensor]) -> Flops:
        """The operations of a micro-batch, forward and backward, given what the model takes."""
        lengths, queries, images = _samples(inputs, self._config)
        per_image = self._config.num_image_tokens
        labels = inputs.get("labels")
        # A row's first token is foreseen by nothing; without labels there are logits of every position.
        heads = sum(lengths) if labels is None else int((labels[:, 1:] != -100).sum())
        language = heads * self._head() + sum(self._layers(length) for length in lengths)
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

    def _layers(self, length: int) -> float:
        layers = range(self._config.text_config.num_hidden_layers)
        return sum(self._layer(length, self._layer_needs(index)) for index in layers)

    def _head(self) -> float:
        """Of one token that is foreseen."""
        text = self._config.text_config
        passes = self._passes("language_model", bool(self._learn) or self._adapters is not None)
        return 2 * text.hidden_size * text.vocab_size * passes

    def _layer_needs(self, index: int) -> bool:
        """Whether the input of a decoder layer needs a gradient, after EmbQ in its layer."""
        after_query = "embedded_query" in self._learn and index >= self._config.query_layer
        return self._embeds_need or after_query or (self._adapters is not None and index > 0)

    def _layer(self, length: int, needs: bool) -> float:
        """A decoder layer: attention and MLP side by side, both behind one norm."""
        width, inner = self._config.text_config.hidden_size, self._config.text_config.intermediate_size
        learns = "language_model" in self._learn
        adapters = self._adapters
        adapted = set(adapters.target_modules) if adapters else set()
        needs = needs or learns  # the norm, if nothing before it

        def product(name: str, rows: int, columns: int, input_needs: bool) -> tuple[float, bool]:
            """Operations of a weight matrix with its adapter, and whether its output needs a gradient."""
            total = rows * columns * (1 + learns + input_needs)
            if adapters and name in adapted:
                total += adapters.rank * (rows * (2 + input_needs) + columns * 3)
            return 2.0 * length * total, input_needs or learns or name in adapted

        query, query_needs = product("q_proj", width, width, needs)
        key, key_needs = product("k_proj", width, width, needs)
        value, value_needs = product("v_proj", width, width, needs)
        up, up_needs = product("fc1", width, inner, needs)
        scores_need = query_needs or key_needs
        attention = 2 * length**2 * width * (1 + query_needs + key_needs + 1 + scores_need + value_needs)
        out, _ = product("dense", width, width, scores_need or value_needs)
        down, _ = product("fc2", inner, width, up_needs)
        return query + key + value + up + attention + out + down

    def _embedded_query(self, length: int, queries: int) -> float:
        config = self._config
        text, vision, inner = config.text_config.hidden_size, config.vision_config.hidden_size, config.query_hidden_size
        patches = config.num_tiles * config.num_patches
        learns = "embedded_query" in self._learn
        hidden_need = self._embeds_need or (self._adapters is not None and config.query_layer > 0)
        text_need = hidden_need or learns
        keys_need = self._patches_need or learns
        inside = self._passes("embedded_query", text_need)
        of_patches = self._passes("embedded_query", self._patches_need)
        keys = self._passes("embedded_query", keys_need)
        total = 2 * length * text * inner * self._passes("embedded_query", hidden_need)
        total += 2 * inner**2 * (queries + 2 * length) * inside
        total += 2 * patches * vision * inner * of_patches + 2 * patches * inner**2 * keys
        total += 2 * patches * vision**2 * of_patches
        total += 2 * inner**2 * queries * inside + 2 * queries * vision * text * inside
        total += 2 * 2 * queries * length * inner * (3 if text_need else 1)
        # Where nothing behind the keys or values learns, no gradient goes to them.
        scores = 1 + text_need + keys_need
        values = 1 + (text_need or keys_need) + keys_need
        total += 2 * queries * patches * (inner * scores + vision * values)
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


class Peak(NamedTuple):
    """What a device can do, in TFLOP/s, and how that is known."""

    tflops: float
    source: str


def find_peak(stated: float | None, device: torch.device, dtype: torch.dtype) -> Peak:
    """What the recipe states, else what the maker states for this GPU in bf16, else what matrix products reach here."""
    if stated:
        return Peak(stated, "stated by the recipe")
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for chip, peak in PEAK_TFLOPS.items():
            if chip in name:
                return Peak(peak, f"stated by the maker of the {chip}")
    return Peak(measure_tflops(device, dtype), f"measured by matrix products in {str(dtype).removeprefix('torch.')}")


def measure_tflops(device: torch.device, dtype: torch.dtype) -> float:
    """The best of a few square matrix products; a fraction of a second."""
    on_gpu = device.type == "cuda"
    size, rounds = (8192, 10) if on_gpu else (1024, 5)
    own = torch.Generator(device).manual_seed(0)  # a run's random numbers stay what they were
    left, right = (torch.randn(size, size, device=device, generator=own).to(dtype) for _ in range(2))
    best = float("inf")
    for _ in range(rounds):
        if on_gpu:
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        left @ right
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best / 1e12
