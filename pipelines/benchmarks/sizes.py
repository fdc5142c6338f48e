"""The models that training is measured with: small enough for a CPU, and shaped so that the figures mean something."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashsloth import FlashSlothImageProcessor, FlashSlothProcessor
from pipelines.benchmarks.conversations import draw_shapes, write_folder
from pipelines.scenes.tokenizer import train_tokenizer
from pipelines.training.model_settings import ModelSettings, PartName

# What the instruct recipe trains: everything but the tower.
TRAIN_PARTS: list[PartName] = ["pooling", "projector", "query_tokens", "embedded_query", "language_model"]


@dataclass(frozen=True)
class Size:
    """A model and the pictures that it looks at."""

    image_size: int
    num_image_tokens: int
    overrides: dict[str, Any]
    """Of the preset `tiny`."""

    def write(self, work: Path, num_rows: int, seed: int) -> tuple[FlashSlothProcessor, str]:
        """A processor, saved in `work`, and the prepared folder there of rows drawn like LLaVA's mix."""
        tokenizer = train_tokenizer(["a question . an answer ."] * 50, 400)
        images = FlashSlothImageProcessor(size=self.image_size)
        processor = FlashSlothProcessor(images, tokenizer, num_image_tokens=self.num_image_tokens)
        processor.save_pretrained(self._processor_folder(work))
        shapes = draw_shapes(num_rows, seed, self.num_image_tokens)
        folder = work / f"conversations-{self.image_size}-{seed}-{num_rows}"
        return processor, write_folder(folder, shapes, processor, seed)

    def model(self, work: Path) -> ModelSettings:
        """The model, as a recipe names it."""
        return ModelSettings(preset="tiny", processor=str(self._processor_folder(work)), overrides=self.overrides)

    def _processor_folder(self, work: Path) -> Path:
        return work / f"processor-{self.image_size}"


# Tower and language model share the work as in the full size: about 1 to 9.
MID = Size(
    image_size=384,
    num_image_tokens=81,
    overrides={
        "vision_config": {
            "hidden_size": 144,
            "intermediate_size": 538,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
        },
        "text_config": {
            "vocab_size": 4096,
            "hidden_size": 320,  # heads of 80, as in Phi-2
            "intermediate_size": 1280,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "max_position_embeddings": 3072,
        },
        "query_layer": 2,
        "query_hidden_size": 64,
        "pooling_dropout": 0.0,  # its draws would make losses differ that are to be compared
    },
)
# The quickstart's model: so fast that whatever is done once per step shows.
TINY = Size(
    image_size=126,
    num_image_tokens=9,
    overrides={"text_config": {"max_position_embeddings": 3072}, "pooling_dropout": 0.0},
)


def full_size_processor(tiling: str, quick: bool) -> FlashSlothProcessor:
    """What the published model looks through, base or HD, with a few made-up words; with `quick`, the tiny one."""
    size, per_tile = (TINY.image_size, TINY.num_image_tokens) if quick else (384, 81)
    images = FlashSlothImageProcessor(size=size, tiling=tiling)
    tokenizer = train_tokenizer(["a question . an answer ."] * 50, 400)
    return FlashSlothProcessor(images, tokenizer, num_image_tokens=per_tile * images.num_tiles)
