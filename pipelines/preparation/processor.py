"""The processor that a preparation runs with: a saved one, or the published model's around a tokenizer."""

from __future__ import annotations

from transformers import AutoTokenizer

from flashsloth import FlashSlothImageProcessor, FlashSlothProcessor
from pipelines.hub import only_local, where
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
    name = str(settings.processor)
    local = only_local(name)
    try:
        return FlashSlothProcessor.from_pretrained(name, local_files_only=local)
    except (OSError, ValueError, TypeError) as error:
        raise PlanError(
            f"processor: {where(name, local)} holds no FlashSlothProcessor to load: {_first_line(error)}"
        ) from error


def _published(tokenizer: str, tiling: str) -> FlashSlothProcessor:
    images = FlashSlothImageProcessor(tiling=tiling)
    local = only_local(tokenizer)
    try:
        text = AutoTokenizer.from_pretrained(tokenizer, local_files_only=local)
        return FlashSlothProcessor(images, text, num_image_tokens=_TOKENS_PER_TILE * images.num_tiles)
    except (OSError, ValueError) as error:
        raise PlanError(f"tokenizer: {where(tokenizer, local)} cannot be used: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
