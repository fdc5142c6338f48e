"""The files of an exported checkpoint: whether they are what can be served. Reads no weights, and needs no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipelines.storage import download, filesystem, is_local, join, list_sizes, sha256
from pipelines.storage.scratch import scratch

EXPORT_LIST = "export.json"
"""Written last into an export, with the sha256 of each file. Folders from elsewhere have none."""
WEIGHTS = ".safetensors"


class CheckpointError(ValueError):
    """A folder that cannot be served; the message names it and says why."""


@contextmanager
def local_folder(checkpoint: str | Path, with_weights: bool = True) -> Iterator[Path]:
    """The checkpoint as a local folder; of one on an object store a copy, which is removed at the end of the block.

    Args:
        checkpoint: a folder or URI.
        with_weights: False: a copy is made without its weights, which are nearly all of it.

    Raises:
        CheckpointError: there is no such folder.
    """
    uri = str(checkpoint)
    store, path = filesystem(uri)
    if not store.isdir(path):
        raise CheckpointError(f"{uri}: no such folder; name the folder that training exported")
    if is_local(uri):
        yield Path(path)
        return
    with scratch("checkpoint") as copy:
        for name in list_sizes(uri):
            if with_weights or not name.endswith(WEIGHTS):
                download(join(uri, name), copy / name)
        yield copy


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
    if not any(name.endswith(WEIGHTS) for name in names):
        raise CheckpointError(
            f"{checkpoint}: no .safetensors file; weights in other formats can run code when read, and are not served"
        )


def exported_files(checkpoint: str | Path) -> dict[str, str] | None:
    """Name -> sha256 of each file as it was exported, read without a download; None where no list is there.

    Raises:
        CheckpointError: the list cannot be read.
    """
    store, path = filesystem(str(checkpoint))
    try:
        text = store.cat_file(f"{path}/{EXPORT_LIST}")
    except FileNotFoundError:
        return None
    try:
        return dict(json.loads(text)["files"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{checkpoint}/{EXPORT_LIST}: this is no list of exported files ({error})") from error


def check_hashes(checkpoint: str | Path, folder: Path) -> None:
    """Compare every file of an export with the sha256 that was noted when it was written.

    Args:
        checkpoint: as it is named.
        folder: where its files lie on this machine.

    Raises:
        CheckpointError: a file is missing or is not the one that was exported, or the list of them cannot be read.
    """
    for name, expected in (exported_files(checkpoint) or {}).items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{checkpoint}: {name} is missing, which was exported")
        found = _sha256(folder / name)
        if found != expected:
            raise CheckpointError(
                f"{checkpoint}: {name} has sha256 {found[:12]}..., the exported file had {str(expected)[:12]}...; "
                "export it again"
            )


def checkpoint_identity(checkpoint: str | Path) -> str:
    """The sha256 over the names and hashes of a checkpoint's files: what tells one model from another.

    An export lists the hashes of its files, so that a remote one need not be read for it.

    Raises:
        CheckpointError: there is no checkpoint that can be served, or its list of files cannot be read.
    """
    check_folder(checkpoint)
    files = exported_files(checkpoint)
    if files is None:
        with local_folder(checkpoint) as folder:
            files = {path.name: _sha256(path) for path in folder.iterdir() if path.is_file()}
    return sha256(repr(sorted(files.items())).encode())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
