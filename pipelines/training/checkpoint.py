"""Training checkpoints that can be trusted.

Written: every rank saves its DeepSpeed shards into a fresh folder of its own; sizes and sha256 of all ranks' files are
gathered into `checkpoint.json`, the last file; then every rank reports, and Ray Train uploads all folders into one
while training goes on. Loaded: the newest one whose every file is there with the size and hash it was written with. A
partial upload, a truncated file or a flipped byte makes it fall back to the one before, and it says so. It never
starts from step 0 in silence.
"""

from __future__ import annotations

import hashlib
import tempfile
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.fs
import ray.train
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, ValidationError
from ray.train import Checkpoint, CheckpointUploadMode

from pipelines import storage
from pipelines.feed import Position

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MANIFEST_NAME = "checkpoint.json"
_TAG = "state"
_PREFIX = "step-"


class CheckpointError(ValueError):
    """Checkpoints exist, and none can be used for this run; the message says why for each."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunIdentity(_Strict):
    """What a run may not change when it goes on from a checkpoint."""

    data: list[str]
    """Identity of each manifest that is read, in order."""
    seed: int
    global_batch: int
    length_group: int
    train_parts: list[str]
    precision: str
    zero_stage: int
    num_workers: int


class FileEntry(_Strict):
    """A file below the checkpoint's folder."""

    name: str
    bytes: int
    sha256: str


class CheckpointManifest(_Strict):
    """`checkpoint.json`."""

    version: int = 1
    step: int
    """Optimizer steps done."""
    position: Position
    """The next batch of the feed."""
    run: RunIdentity
    files: list[FileEntry]


class Progress(_Strict):
    """How far a run has come."""

    step: int = 0
    position: Position = Position()


def save_checkpoint(
    engine: DeepSpeedEngine, progress: Progress, identity: RunIdentity, metrics: dict[str, Any]
) -> None:
    """Save and report on every rank; returns when the local files are written, the upload goes on behind."""
    rank = dist.get_rank()
    folder = Path(tempfile.mkdtemp(prefix=f"flashsloth-step-{progress.step}-rank-{rank}-"))
    # Frozen parameters are left out: they are what the run started from, and most of a 3.2B alignment checkpoint.
    engine.save_checkpoint(str(folder), tag=_TAG, save_latest=False, exclude_frozen_parameters=True)
    for script in folder.glob("*.py"):  # DeepSpeed copies scripts that unpickle; a checkpoint is data, not a program
        script.unlink()
    entries: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(entries, [_describe(path, folder) for path in _files(folder)])
    if rank == 0:
        manifest = CheckpointManifest(
            step=progress.step,
            position=progress.position,
            run=identity,
            files=sorted((entry for part in entries for entry in part), key=lambda entry: entry.name),
        )
        (folder / MANIFEST_NAME).write_text(manifest.model_dump_json(indent=1))
    ray.train.report(
        metrics,
        checkpoint=Checkpoint.from_directory(folder),
        # Of this attempt alone: a killed attempt may have left half of an upload under its name (ray#41700).
        checkpoint_dir_name=f"{_PREFIX}{progress.step:08d}-{_shared_word()}",
        checkpoint_upload_mode=CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


def restore(engine: DeepSpeedEngine, identity: RunIdentity) -> Progress:
    """Load the newest checkpoint of this run that verifies, and say which; a run without any starts at step 0.

    Raises:
        CheckpointError: There are checkpoints, but none verifies; or the newest good one belongs to other settings.
    """
    problems: list[str] = []
    for checkpoint in _stored_checkpoints():
        with checkpoint.as_directory() as directory:
            folder = Path(directory)
            problem = _agreed_problem(folder)
            if problem:
                problems.append(f"{Path(checkpoint.path).name}: {problem}")
                _say(f"checkpoint {problems[-1]}; falling back to the one before")
                continue
            manifest = _read_manifest(folder)
            _require_same_run(manifest, identity, checkpoint.path)
            _load(engine, folder, manifest)
            _say(f"resuming from {checkpoint.path} (step {manifest.step}, every file verified)")
            dist.barrier()
        _remove_remains(checkpoint)
        return Progress(step=manifest.step, position=manifest.position)
    if problems:
        raise CheckpointError(
            "no checkpoint of this run verifies, and starting over would throw its steps away: "
            + "; ".join(problems)
            + ". Give the run another name to start over"
        )
    _say("no checkpoint yet: starting at step 0")
    return Progress()


def refuse_changed_run(run_uri: str, identity: RunIdentity) -> None:
    """Look at the newest checkpoint in a run's folder before any worker starts.

    Raises:
        CheckpointError: It was written with settings that a continued run may not change.
    """
    for name in reversed([name for name in storage.list_names(run_uri) if name.startswith(_PREFIX)]):
        where = storage.join(run_uri, name)
        try:
            manifest = CheckpointManifest.model_validate_json(storage.read_bytes(storage.join(where, MANIFEST_NAME)))
        except (FileNotFoundError, ValidationError):
            continue  # incomplete or damaged: the workers will pass over it too, and say so
        _require_same_run(manifest, identity, where)
        return


def verify(folder: Path, part: int = 0, num_parts: int = 1) -> str | None:
    """What is wrong with the checkpoint in `folder`, or None. Hashes every `num_parts`-th file from `part` on."""
    try:
        manifest = _read_manifest(folder)
    except FileNotFoundError:
        return f"{MANIFEST_NAME} is missing, it was never completed"
    except ValidationError as error:
        return f"{MANIFEST_NAME} is damaged ({error.errors()[0]['msg']})"
    for entry in manifest.files[part::num_parts]:
        path = folder / entry.name
        if not path.exists():
            return f"{entry.name} is missing"
        if path.stat().st_size != entry.bytes:
            return f"{entry.name} has {path.stat().st_size} bytes, {entry.bytes} were written"
        found = _sha256(path)
        if found != entry.sha256:
            return f"{entry.name} has sha256 {found[:12]}..., {entry.sha256[:12]}... was written"
    return None


def _stored_checkpoints() -> list[Checkpoint]:
    """The checkpoints in the run's folder, the newest first, complete or not.

    The folder is listed, not Ray's record of reports: a checkpoint that was complete when its workers died before the
    report is as good as any, and losing that record must not mean step 0.
    """
    run = ray.train.get_context().get_storage()
    paths: list[Any] = [None]
    if dist.get_rank() == 0:
        found = run.storage_filesystem.get_file_info(pyarrow.fs.FileSelector(run.experiment_fs_path))
        paths = [sorted((info.path for info in found if info.base_name.startswith(_PREFIX)), reverse=True)]
    dist.broadcast_object_list(paths, src=0)  # ranks on other machines must try the same ones
    return [Checkpoint(path, run.storage_filesystem) for path in paths[0]]


def _remove_remains(loaded: Checkpoint) -> None:
    """Delete what killed attempts left: Ray Train deletes old checkpoints, but only those that were reported to it."""
    keep = {Path(item.checkpoint.path).name for item in ray.train.get_all_reported_checkpoints()}
    stored = _stored_checkpoints()
    if dist.get_rank() == 0 and keep:
        for checkpoint in stored:
            if Path(checkpoint.path).name not in keep | {Path(loaded.path).name}:
                checkpoint.filesystem.delete_dir(checkpoint.path)


def _load(engine: DeepSpeedEngine, folder: Path, manifest: CheckpointManifest) -> None:
    # Not strict, since frozen parameters are left out; the files are the ones that this model wrote, as they verify and
    # the run's identity holds. The tag is explicit: without one DeepSpeed goes on from step 0 with a mere warning.
    loaded, _ = engine.load_checkpoint(str(folder), tag=_TAG, load_module_strict=False)
    if loaded is None or engine.global_steps != manifest.step:
        raise CheckpointError(
            f"{folder}: DeepSpeed came out at step {engine.global_steps}, the checkpoint is of step {manifest.step}"
        )


def _require_same_run(manifest: CheckpointManifest, identity: RunIdentity, where: str) -> None:
    saved, wanted = manifest.run.model_dump(), identity.model_dump()
    changed = [
        f"{name} was {saved[name]!r} and is now {wanted[name]!r}" for name in wanted if saved[name] != wanted[name]
    ]
    if changed:
        raise CheckpointError(
            f"{where} cannot be continued with these settings: {'; '.join(changed)}. Undo the change, or give the run "
            "another run.name to start over"
        )


def _agreed_problem(folder: Path) -> str | None:
    """Verify together: the workers of a machine share the files out, and all hear of the first problem."""
    context = ray.train.get_context()
    found: list[Any] = [None] * dist.get_world_size()
    mine = verify(folder, context.get_local_rank(), context.get_local_world_size())
    dist.all_gather_object(found, mine)
    return next((problem for problem in found if problem), None)


def _read_manifest(folder: Path) -> CheckpointManifest:
    return CheckpointManifest.model_validate_json((folder / MANIFEST_NAME).read_bytes())


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _describe(path: Path, folder: Path) -> FileEntry:
    return FileEntry(name=path.relative_to(folder).as_posix(), bytes=path.stat().st_size, sha256=_sha256(path))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _shared_word() -> str:
    word = [uuid.uuid4().hex[:8]]
    dist.broadcast_object_list(word, src=0)
    return word[0]


def _say(message: str) -> None:
    if dist.get_rank() == 0:
        print(message, flush=True)
