"""Names of processors and tokenizers: folders on this machine, or repositories of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError

_PATIENCE_S = 10


def only_local(name: str) -> bool:
    """Whether `name` can only be had from this machine: it is a folder here, no repository's name, or the hub is away.

    Whoever loads `name` passes this on as `local_files_only`: transformers would ask a hub that cannot be reached for
    every file six times, which takes minutes, before it says that a misspelt folder is not there.
    """
    if Path(name).is_dir():
        return True
    try:
        HfApi().model_info(name, timeout=_PATIENCE_S)
    except HfHubHTTPError:  # it answers; what it refuses, transformers explains
        return False
    except (HFValidationError, HTTPError, OSError):
        return True
    return False


def is_missing(name: str) -> bool:
    """Whether the model `name` can be had from nowhere: `only_local`, and this machine has neither folder nor copy."""
    if not only_local(name) or Path(name).is_dir():
        return False
    try:
        return not isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return True


def for_any_process(name: str) -> str:
    """`name`, a folder of this machine such that a process with another working directory finds it."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def where(name: str, is_only_local: bool) -> str:
    """`name`, with what was found out about it, for an error."""
    if not is_only_local or Path(name).is_dir():
        return name
    return f"{name} (no folder here; the Hugging Face hub was not reached, or cannot have this name)"
