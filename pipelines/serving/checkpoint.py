"""Opening an exported checkpoint to serve it: safetensors only, and every reason to refuse is said in one sentence."""

from __future__ import annotations

import functools
import hashlib
import json
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from pipelines.storage import filesystem, is_local

EXPORT_LIST = "export.json"
"""Written last into an export, with the sha256 of each file. Folders from elsewhere have none."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class CheckpointError(ValueError):
    """A folder that cannot be served; the message names it and says why."""


def fetch(checkpoint: str | Path) -> Path:
    """The checkpoint as a local folder. One on an object store is downloaded into a temporary folder.

    Raises:
        CheckpointError: there is no such folder.
    """
    uri = str(checkpoint)
    store, path = filesystem(uri)
    if not store.isdir(path):
        raise CheckpointError(f"{uri}: no such folder; name the folder that training exported")
    return Path(path) if is_local(uri) else _download(uri)


@functools.cache  # model and processor of one engine come from one download
def _download(uri: str) -> Path:
    store, path = filesystem(uri)
    folder = tempfile.mkdtemp(prefix="flashsloth-checkpoint-")
    store.get(path.rstrip("/") + "/", folder, recursive=True)
    return Path(folder)


def check_folder(checkpoint: str | Path) -> None:
    """Look at the files' names and the config, without loading weights.

    Raises:
        CheckpointError: the folder is missing, is another model's, or has its weights in anything but safetensors.
    """
    store, path = filesystem(str(checkpoint))
    if not store.isdir(path):
        raise CheckpointError(f"{checkpoint}: no such folder; name the folder that training exported")
    names = {entry.rstrip("/").rpartition("/")[2] for entry in store.ls(path, detail=False)}
    if "config.json" not in names:
        raise CheckpointError(
            f"{checkpoint}: no config.json, or its export was killed half-way; name the folder that training "
            "exported, or run the training again: it exports once more"
        )
    try:
        config = json.loads(store.cat_file(f"{path}/config.json"))
    except ValueError as error:
        raise CheckpointError(f"{checkpoint}/config.json is no JSON: {error}") from error
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != "flashsloth":
        hint = "; convert a released one first: python jobs/convert.py" if found == "phi" else ""
        raise CheckpointError(f"{checkpoint}: its config.json says model_type {found!r}, not 'flashsloth'{hint}")
    if not any(name.endswith(".safetensors") for name in names):
        raise CheckpointError(
            f"{checkpoint}: no .safetensors file; weights in other formats can run code when read, and are not served"
        )


def check_hashes(checkpoint: str | Path) -> None:
    """Compare every file of an export with the sha256 that was noted when it was written.

    Raises:
        CheckpointError: a file is missing or is not the one that was exported, or the list of them cannot be read.
    """
    folder = fetch(checkpoint)
    if not (folder / EXPORT_LIST).exists():
        return
    try:
        listed = dict(json.loads((folder / EXPORT_LIST).read_text(encoding="utf-8"))["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint}/{EXPORT_LIST}: this is no list of exported files ({error})") from error
    for name, expected in listed.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{checkpoint}: {name} is missing, which was exported")
        with open(folder / name, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise CheckpointError(
                f"{checkpoint}: {name} has sha256 {found[:12]}..., the exported file had {str(expected)[:12]}...; "
                "export it again"
            )


def load_model(checkpoint: str | Path, device: str = "auto", dtype: str = "auto") -> FlashSlothForConditionalGeneration:
    """The model, in evaluation mode on its device ("auto": a GPU in bfloat16, else the CPU in float32).

    Raises:
        CheckpointError: as `check_folder` and `check_hashes`, and where the weights do not fill the model exactly.
    """
    check_folder(checkpoint)
    check_hashes(checkpoint)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype == "auto":
        dtype = "bfloat16" if device == "cuda" else "float32"
    options = {"dtype": DTYPES[dtype], "use_safetensors": True, "local_files_only": True}
    try:
        model, loading = FlashSlothForConditionalGeneration.from_pretrained(
            fetch(checkpoint), output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in loading.get(problem) or ())
        if keys:
            raise CheckpointError(f"{checkpoint}: {len(keys)} {problem.replace('_', ' ')}, first {keys[0]}")
    return model.to(device).eval()


def load_processor(checkpoint: str | Path) -> FlashSlothProcessor:
    """The processor that was exported beside the model.

    Raises:
        CheckpointError: its files are missing, or it speaks of other tokens than the model.
    """
    check_folder(checkpoint)
    folder = fetch(checkpoint)
    try:
        processor = FlashSlothProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{checkpoint}: no processor can be loaded from it ({error})") from error
    config = FlashSlothForConditionalGeneration.config_class.from_pretrained(folder)
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
