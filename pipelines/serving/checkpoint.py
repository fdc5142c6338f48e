"""Opening an exported checkpoint to serve it: safetensors only, and every reason to refuse is said in one sentence."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoTokenizer

from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration, FlashSlothProcessor
from pipelines.serving.checkpoint_files import CheckpointError, check_folder, check_hashes, local_folder

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def load_model(checkpoint: str | Path, device: str = "auto", dtype: str = "auto") -> FlashSlothForConditionalGeneration:
    """The model, in evaluation mode on its device ("auto": a GPU in bfloat16, else the CPU in float32).

    Raises:
        CheckpointError: as `check_folder` and `check_hashes`, and where a file cannot be read or the weights do not
            fill the model exactly.
    """
    check_folder(checkpoint)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    options = {"dtype": DTYPES[dtype], "use_safetensors": True, "local_files_only": True}
    with local_folder(checkpoint) as folder:
        check_hashes(checkpoint, folder)
        config = _load_config(checkpoint, folder)
        try:
            model, loading = FlashSlothForConditionalGeneration.from_pretrained(
                folder, config=config, output_loading_info=True, **options
            )
        except Exception as error:  # whatever a file raises that is not what its name says
            reason = f"no model can be loaded from its weights ({_in_a_line(error)})"
            raise CheckpointError(f"{checkpoint}: {reason}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in loading.get(problem) or ())
        if keys:
            raise CheckpointError(f"{checkpoint}: {len(keys)} {problem.replace('_', ' ')}, first {keys[0]}")
    return model.to(device).eval()


def load_processor(checkpoint: str | Path) -> FlashSlothProcessor:
    """The processor that was exported beside the model.

    Raises:
        CheckpointError: its files are missing or cannot be read, or it speaks of other tokens than the model.
    """
    check_folder(checkpoint)
    with local_folder(checkpoint, with_weights=False) as folder:
        config = _load_config(checkpoint, folder)
        try:
            processor = FlashSlothProcessor.from_pretrained(folder, local_files_only=True)
        except Exception as error:  # as above
            reason = f"no processor can be loaded from its {_unreadable(folder)} ({_in_a_line(error)})"
            raise CheckpointError(f"{checkpoint}: {reason}") from error
    pairs = {
        "num_image_tokens": (processor.num_image_tokens, config.num_image_tokens),
        "num_query_tokens": (processor.num_query_tokens, config.num_query_tokens),
        "image_token_id": (processor.image_token_id, config.image_token_id),
        "query_token_id": (processor.query_token_id, config.query_token_id),
        "image size": (processor.image_processor.size, config.vision_config.image_size),
    }
    for name, (ours, theirs) in pairs.items():
        if ours != theirs:
            raise CheckpointError(f"{checkpoint}: its processor has {name} {ours}, its model {theirs}")
    return processor


def _load_config(checkpoint: str | Path, folder: Path) -> FlashSlothConfig:
    try:
        return FlashSlothConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        raise CheckpointError(f"{checkpoint}/config.json describes no model ({_in_a_line(error)})") from error


def _unreadable(folder: Path) -> str:
    """Which files are to blame where a processor cannot be loaded."""
    try:
        AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception:  # as above; what it says was said by whoever asks
        return "tokenizer.json and tokenizer_config.json"
    return "processor_config.json"


def _in_a_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
