"""Training checkpoints that can be trusted: what one consists of, and which one a run goes on from.

A checkpoint is a folder `step-NNNNNNNN-WORD` in the run's folder, of this attempt alone: a safetensors file of each
rank, and `checkpoint.json`, written last, with the size and sha256 of each. Loaded is the newest one whose every file
is as it was written. A partial upload, a truncated file or a flipped byte makes the run fall back to the one before,
and it says so. It never starts from step 0 in silence. `pipelines.training.saver` writes them.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines import storage
from pipelines.feed import Position
from pipelines.storage.faults import naming
from pipelines.storage.scratch import new_scratch, remove_scratch, scratch
from pipelines.training.ranks import Ranks
from pipelines.training.state import load_state

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

MANIFEST_NAME = "checkpoint.json"
PREFIX = "step-"


class CheckpointError(ValueError):
    """A checkpoint cannot be written, or none of those that exist can be used; the message says why."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RunIdentity(_Strict):
    """What a run may not change when it goes on from a checkpoint. Workers and ZeRO stage it may."""

    data: list[str]
    """Identity of each manifest that is read, in order."""
    seed: int
    global_batch: int
    length_group: int
    weights: list[float] | None = None
    train_parts: list[str]
    lora: dict[str, Any] | None = None
    precision: str
    start: dict[str, str]
    """What the run began with, by content: see `pipelines.training.start.start_identity`."""


class FileEntry(_Strict):
    """A file in the checkpoint's folder."""

    name: str
    bytes: int
    sha256: str


NEVER_COMPLETED = f"{MANIFEST_NAME} is missing, it was never completed"


class Progress(_Strict):
    """How far a run has come."""

    step: int = 0
    """Optimizer steps done, skipped ones included."""
    position: Position = Position()
    """The next batch of the feed."""


class CheckpointManifest(_Strict):
    """`checkpoint.json`."""

    version: Literal[2] = 2
    progress: Progress
    updates: int
    """Optimizer steps that changed the weights."""
    run: RunIdentity
    world_size: int
    """Workers that wrote it; any number can load it."""
    files: list[FileEntry]

    def fingerprint(self) -> str:
        """What tells this checkpoint from all others."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def restore(engine: DeepSpeedEngine, run_uri: str, identity: RunIdentity, ranks: Ranks) -> Progress:
    """Load the newest checkpoint of this run that verifies, and say which; a run without any starts at step 0.

    Raises:
        CheckpointError: There are checkpoints, but none verifies; or the newest good one belongs to other settings.
        StateError: It belongs to a model with other parameters.
    """
    problems: list[str] = []
    # Listed by one rank: all must try the same ones.
    for name in ranks.share(stored_names(run_uri)):
        uri = storage.join(run_uri, name)
        with verified(uri, ranks) as found:
            if isinstance(found, str):
                problems.append(f"{name}: {found}")
                ranks.say(f"checkpoint {problems[-1]}; falling back to the one before")
                continue
            manifest, folder = found
            _require_same_run(manifest, identity, uri)
            load_state(engine, [folder / entry.name for entry in manifest.files], manifest.updates)
            ranks.say(
                f"resuming from {uri} (step {manifest.progress.step}, every file verified; "
                f"written by {manifest.world_size} workers, loaded by {ranks.world_size})"
            )
        return manifest.progress
    # One alone and never completed: the run lost a worker while it saved for the first time. There is nothing to lose.
    if problems and not (len(problems) == 1 and problems[0].endswith(NEVER_COMPLETED)):
        raise CheckpointError(
            "no checkpoint of this run verifies, and starting over would throw its steps away: "
            + "; ".join(problems)
            + ". Give the run another name to start over"
        )
    ranks.say("no checkpoint yet: starting at step 0")
    return Progress()


def refuse_changed_run(run_uri: str, identity: RunIdentity) -> None:
    """Look at the newest checkpoint in a run's folder before any worker starts.

    Raises:
        CheckpointError: It was written with settings that a continued run may not change.
    """
    for name in stored_names(run_uri):
        uri = storage.join(run_uri, name)
        manifest = read_manifest(uri)
        if isinstance(manifest, CheckpointManifest):
            _require_same_run(manifest, identity, uri)
            return
        # Incomplete or damaged: the workers will pass over it too, and say so.


def stored_names(run_uri: str) -> list[str]:
    """The checkpoints in a run's folder, the newest first, complete or not.

    The folder is listed, not Ray's record of reports: a checkpoint that was complete when its workers died before the
    report is as good as any, and losing that record must not mean step 0.
    """
    return sorted((name for name in storage.list_names(run_uri) if name.startswith(PREFIX)), reverse=True)


def read_manifest(uri: str) -> CheckpointManifest | str:
    """The manifest of the checkpoint at `uri`, or what is wrong with it."""
    try:
        return CheckpointManifest.model_validate_json(storage.read_bytes(storage.join(uri, MANIFEST_NAME)))
    except (FileNotFoundError, NotADirectoryError):
        return NEVER_COMPLETED
    except ValidationError as error:
        return f"{MANIFEST_NAME} is damaged ({error.errors()[0]['msg']})"


@contextmanager
def verified(uri: str, ranks: Ranks) -> Iterator[tuple[CheckpointManifest, Path] | str]:
    """The checkpoint at `uri` with a local folder of its files, or what is wrong with it. Collective.

    The ranks of a machine share the reading and hashing, and all hear of the first problem. From an object store each
    machine fetches one copy, which is gone at the end.

    Raises:
        CheckpointError: The store does not answer.
    """
    manifest = ranks.share(read_manifest(uri) if ranks.rank == 0 else None)
    if isinstance(manifest, str):
        yield manifest
        return
    local = storage.is_local(uri)
    word = ranks.share(uuid.uuid4().hex)
    folder = Path(uri)
    try:
        mine = manifest.files[ranks.local_rank :: ranks.local_world_size]
        problem: str | Exception | None
        try:
            folder = folder if local else new_scratch("restore", word)
            problem = (None if local else _fetch(uri, mine, folder)) or find_problem(folder, mine)
        except (OSError, ValueError) as error:  # a store that does not answer is no damage: never fall back for it
            problem = error
        problem = next((found for found in ranks.gather(problem) if found), None)
        if isinstance(problem, Exception):
            raise CheckpointError(f"{uri} cannot be read: {problem}") from problem
        yield problem or (manifest, folder)
        ranks.barrier()  # not every file system has the locks by which nobody removes what another one reads
    finally:
        remove_scratch(folder)


@contextmanager
def opened(uri: str) -> Iterator[tuple[CheckpointManifest, Path]]:
    """The checkpoint at `uri`, verified, with a local folder of its files; for one process alone.

    Raises:
        CheckpointError: It does not verify.
        StorageError: The store does not answer.
    """
    manifest = read_manifest(uri)
    if isinstance(manifest, str):
        raise CheckpointError(f"{uri}: {manifest}")
    local = storage.is_local(uri)
    with nullcontext(Path(uri)) if local else scratch("checkpoint") as folder:
        problem = (None if local else _fetch(uri, manifest.files, folder)) or find_problem(folder, manifest.files)
        if problem:
            raise CheckpointError(f"{uri}: {problem}")
        yield manifest, folder


def find_problem(folder: Path, entries: Sequence[FileEntry]) -> str | None:
    """What is wrong with the files of a checkpoint in `folder`, or None."""
    for entry in entries:
        path = folder / entry.name
        if not path.exists():
            return f"{entry.name} is missing"
        if path.stat().st_size != entry.bytes:
            return f"{entry.name} has {path.stat().st_size} bytes, {entry.bytes} were written"
        found = sha256_of(path)
        if found != entry.sha256:
            return f"{entry.name} has sha256 {found[:12]}..., {entry.sha256[:12]}... was written"
    return None


def sha256_of(path: Path) -> str:
    """The hash of a file, as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def remove_remains(run_uri: str, ranks: Ranks) -> None:
    """Delete what killed attempts left: checkpoints that were never completed. Collective."""
    for name in stored_names(run_uri) if ranks.rank == 0 else []:
        if not isinstance(read_manifest(storage.join(run_uri, name)), CheckpointManifest):
            remove(run_uri, name)
    ranks.barrier()


def remove(run_uri: str, name: str) -> None:
    """Delete a folder of the run's; it need not exist."""
    uri = storage.join(run_uri, name)
    file_system, path = storage.filesystem(uri)
    try:
        with naming(uri):
            file_system.rm(path, recursive=True)
    except FileNotFoundError:
        pass


def _fetch(uri: str, entries: Sequence[FileEntry], folder: Path) -> str | None:
    file_system, path = storage.filesystem(uri)
    for entry in entries:
        try:
            with naming(storage.join(uri, entry.name)):
                file_system.get_file(f"{path}/{entry.name}", str(folder / entry.name))
        except FileNotFoundError:
            return f"{entry.name} is missing"
    return None


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
