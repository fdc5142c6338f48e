"""The checkpoint that leaves a training run: a `from_pretrained` folder of safetensors and processor files.

Written beside its place and renamed into it, or, on an object store, uploaded with `export.json` last. That file lists
what the folder holds; without it the folder is no checkpoint of ours but the remains of a killed export.
"""

from __future__ import annotations

import glob
import hashlib
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from transformers import PreTrainedModel

from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration, FlashSlothProcessor
from pipelines import storage
from pipelines.storage.scratch import new_scratch, remove_scratch

MANIFEST_NAME = "export.json"
_LARGEST_FILE = "4GB"
_PART = ".part"
"""Ends the name of a folder that is being written."""
_OLD = ".old"
"""Ends the name of an earlier export, while the new one takes its place."""


class ExportError(ValueError):
    """A folder is no complete checkpoint; the message names it and what is missing."""


class ExportManifest(BaseModel):
    """`export.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = 1
    step: int
    """Optimizer steps that the weights have behind them; 0 in a folder that `jobs/convert.py` wrote."""
    files: dict[str, str]
    """File name -> sha256."""


def write_export(
    target: str,
    model: PreTrainedModel,
    state_dict: Mapping[str, torch.Tensor],
    processor: FlashSlothProcessor,
    step: int,
) -> None:
    """Save `state_dict` as a checkpoint of `model`'s kind, with its processor, at the folder or URI `target`."""
    local = storage.is_local(target)
    parent = Path(target).parent if local else new_scratch("export")
    for ending in (_PART, _OLD):  # left by an export that was killed
        for remains in parent.glob(f".{glob.escape(Path(target).name)}.*{ending}"):
            shutil.rmtree(remains, ignore_errors=True)
    folder = parent / f".{Path(target).name}.{uuid.uuid4().hex[:8]}{_PART}"
    try:
        model.save_pretrained(
            folder, state_dict=dict(state_dict), max_shard_size=_LARGEST_FILE, save_original_format=False
        )
        processor.save_pretrained(folder)
        files = {path.name: _sha256(path) for path in sorted(folder.iterdir())}
        manifest = ExportManifest(step=step, files=files)
        (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1))
        if local:
            _replace(folder, Path(target))
        else:
            _upload(folder, target, manifest)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if not local:
            remove_scratch(parent)


def fetch_export(uri: str) -> Path:
    """A checkpoint's folder on this machine; one on an object store is downloaded and verified first.

    Local folders may come from elsewhere, so they need no `export.json`.

    Raises:
        ExportError: There is no such folder, or it is not complete.
    """
    if storage.is_local(uri):
        folder = Path(storage.resolve(uri))
        _require_checkpoint(folder)
        return folder
    try:
        manifest = ExportManifest.model_validate_json(storage.read_bytes(storage.join(uri, MANIFEST_NAME)))
    except FileNotFoundError as error:
        raise ExportError(
            f"{uri}: no {MANIFEST_NAME} here: no checkpoint, or its export was killed half-way"
        ) from error
    # Named by content, so a second fetch of the same checkpoint finds it and another one never mixes with it.
    key = hashlib.sha256(manifest.model_dump_json().encode()).hexdigest()[:16]
    folder = Path.home() / ".cache" / "flashsloth" / "checkpoints" / key
    if not folder.exists():
        _download(uri, manifest, folder)
    return folder


def load_export(
    uri: str, dtype: torch.dtype, tiling: Literal["base", "hd"] | None = None
) -> FlashSlothForConditionalGeneration:
    """The model of a checkpoint, looking at images through `tiling` where given, else as it was trained.

    Raises:
        ExportError: The folder is no checkpoint, lacks weights or has unknown ones; transformers itself would start
            missing ones from random numbers and only warn.
    """
    folder = fetch_export(uri)
    model, loading = FlashSlothForConditionalGeneration.from_pretrained(
        folder, config=export_config(folder, tiling), dtype=dtype, output_loading_info=True
    )
    wrong = {kind: sorted(loading[kind]) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(wrong.values()):
        listed = "; ".join(f"{kind}: {', '.join(map(str, keys))}" for kind, keys in wrong.items() if keys)
        raise ExportError(f"{uri}: its weights do not fit its configuration: {listed}")
    return model


def export_config(folder: Path, tiling: Literal["base", "hd"] | None = None) -> FlashSlothConfig:
    """The configuration of a checkpoint, as `load_export` takes it."""
    config = FlashSlothConfig.from_pretrained(folder)
    config.tiling = tiling or config.tiling
    return config


def read_export_step(uri: str) -> int | None:
    """The step that the export at `uri` is of, or None where there is no complete export."""
    try:
        return ExportManifest.model_validate_json(storage.read_bytes(storage.join(uri, MANIFEST_NAME))).step
    except FileNotFoundError:
        return None


def weights_identity(uri: str) -> str:
    """What tells the model in a folder or at a URI from all others: 64 hexadecimal digits of weights and configuration.

    Of an export its manifest knows them; those of another folder, which may hold any model, are hashed.
    """
    try:
        files = ExportManifest.model_validate_json(storage.read_bytes(storage.join(uri, MANIFEST_NAME))).files
    except FileNotFoundError:
        files = {path.name: _sha256(path) for path in Path(uri).iterdir() if _is_weights(path.name)}
    kept = sorted((name, digest) for name, digest in files.items() if _is_weights(name))
    return hashlib.sha256(repr(kept).encode()).hexdigest()


def _is_weights(name: str) -> bool:
    return name == "config.json" or name.endswith((".safetensors", ".bin"))


def _require_checkpoint(folder: Path) -> None:
    killed = "what an export left that was killed half-way: run the training again, it exports once more"
    if folder.name.endswith(_PART):
        raise ExportError(f"{folder} is no checkpoint but {killed}")
    if not folder.is_dir():
        remains = sorted(folder.parent.glob(f".{folder.name}.*{_PART}"))
        beside = f"; {remains[0].name} beside it is {killed}" if remains else ""
        raise ExportError(f"{folder}: there is no such checkpoint folder{beside}")
    if (folder / MANIFEST_NAME).exists():
        manifest = ExportManifest.model_validate_json((folder / MANIFEST_NAME).read_bytes())
        if gone := [name for name in manifest.files if not (folder / name).exists()]:
            raise ExportError(
                f"{folder} is no whole checkpoint: {MANIFEST_NAME} lists {', '.join(gone)}, which is gone"
            )
    weights = ("model.safetensors", "model.safetensors.index.json")
    missing = [] if (folder / "config.json").exists() else ["config.json"]
    if not any((folder / name).exists() for name in weights):
        missing.append(" or ".join(weights))
    if missing:
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ExportError(f"{folder} is no FlashSloth checkpoint: it lacks {' and '.join(missing)}; it holds {found}")


def _replace(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`; an earlier export there makes way, since a folder cannot be renamed over another."""
    old = folder.with_suffix(_OLD)
    if target.exists():
        target.rename(old)
    folder.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _upload(folder: Path, target: str, manifest: ExportManifest) -> None:
    file_system, path = storage.filesystem(target)
    # From here on the folder is no checkpoint until the new one is complete: for those who know the list of its files,
    # and for all others, who know that a model has a configuration.
    closing = ("config.json", MANIFEST_NAME)
    for name in closing:
        if file_system.exists(f"{path}/{name}"):
            file_system.rm(f"{path}/{name}")
    for name in (*(name for name in manifest.files if name not in closing), *closing):
        file_system.put_file(str(folder / name), f"{path}/{name}")


def _download(uri: str, manifest: ExportManifest, folder: Path) -> None:
    file_system, path = storage.filesystem(uri)
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = new_scratch("checkpoint", parent=folder.parent)  # to be renamed: on one disk with its place
    try:
        for name, expected in manifest.files.items():
            file_system.get_file(f"{path}/{name}", str(part / name))
            found = _sha256(part / name)
            if found != expected:
                raise ExportError(f"{uri}/{name}: expected sha256 {expected}, found {found}")
        try:
            part.rename(folder)
        except OSError:
            if not folder.exists():  # another process of this machine was faster: its copy is as good
                raise
    finally:
        remove_scratch(part)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def consolidated(engine: Any) -> Mapping[str, torch.Tensor] | None:
    """All weights of a DeepSpeed engine on rank 0, None on the others. Collective under ZeRO-3: call on every rank."""
    if engine.zero_optimization_partition_weights():
        return engine._zero3_consolidated_16bit_state_dict()
    return engine.module.state_dict() if engine.global_rank == 0 else None
