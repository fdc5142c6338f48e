"""Names of processors and tokenizers: folders on this machine, or repositories of the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id

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
    return not _may_be_a_repository(name) or not isinstance(try_to_load_from_cache(name, "config.json"), str)


def for_any_process(name: str) -> str:
    """`name`, a folder of this machine such that a process with another working directory finds it."""
    return str(Path(name).resolve()) if Path(name).is_dir() else name


def where(name: str, is_only_local: bool) -> str:
    """`name` for an error; one that the hub may have, with the remark that the hub was not reached."""
    if is_only_local and not Path(name).is_dir() and _may_be_a_repository(name):
        return f"{name} (no folder here, and the Hugging Face hub was not reached)"
    return name


def _may_be_a_repository(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True
