"""The processor that a preparation runs with: a saved one, or the published model's around a tokenizer."""

from __future__ import annotations

from transformers import AutoTokenizer

from flashsloth import FlashSlothImageProcessor, FlashSlothProcessor
from pipelines.preparation.settings import PrepareSettings
from pipelines.preparation.sources import PlanError

_TOKENS_PER_TILE = 81


def load_processor(settings: PrepareSettings) -> FlashSlothProcessor:
    """The processor that `settings` names.

    Raises:
        PlanError: there is none.
    """
    if settings.tokenizer:
        return _published(settings.tokenizer, settings.tiling or "base")
    try:
        return FlashSlothProcessor.from_pretrained(settings.processor)
    except (OSError, ValueError, TypeError) as error:
        raise PlanError(
            f"processor: {settings.processor} holds no FlashSlothProcessor to load: {_first_line(error)}"
        ) from error


def _published(tokenizer: str, tiling: str) -> FlashSlothProcessor:
    images = FlashSlothImageProcessor(tiling=tiling)
    try:
        text = AutoTokenizer.from_pretrained(tokenizer)
        return FlashSlothProcessor(images, text, num_image_tokens=_TOKENS_PER_TILE * images.num_tiles)
    except (OSError, ValueError) as error:
        raise PlanError(f"tokenizer: {tokenizer} cannot be used: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
