"""Writing checkpoints: the ranks' files first, the manifest last, the upload while training goes on.

1. Every rank writes its file on this machine, between two steps: into the checkpoint's folder where the run's storage
   is a file system, else into a temporary one. If any rank cannot (a full disk), the run ends; earlier ones stay.
2. In a thread, every rank hashes and uploads its file. The ranks' threads tell each other sizes and hashes.
3. Rank 0's thread writes `checkpoint.json`. Until it is there the checkpoint does not exist for anybody.
4. At the first step at which all ranks' threads are done, every rank reports it to Ray Train.

An upload that fails, after the store's own retries, costs that checkpoint and is counted; so many in a row as
`run.max_failed_saves` end the run, since it would go on without a net.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError

from pipelines import storage
from pipelines.storage.faults import naming
from pipelines.storage.scratch import new_scratch, remove_scratch
from pipelines.training.checkpoint import (
    MANIFEST_NAME,
    PREFIX,
    CheckpointError,
    CheckpointManifest,
    FileEntry,
    Progress,
    RunIdentity,
    sha256_of,
)
from pipelines.training.ranks import Ranks
from pipelines.training.state import count_updates, write_state

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

_UPLOAD_TIMEOUT_S = 2 * 3600.0
"""How long a rank waits for the slowest rank's upload."""


@dataclass
class _Save:
    """A checkpoint on its way."""

    name: str
    folder: Path
    """Where this rank's file lies."""
    entry_name: str
    manifest: CheckpointManifest
    """Without files."""
    problem: str | None = None


class CheckpointSaver:
    """Saves checkpoints of one run. Every rank makes the same calls at the same steps.

    Args:
        run_uri: The run's folder.
        identity: Stored in each manifest.
        ranks: For agreement between steps.
        max_failed: Failed saves in a row that end the run.
        report: Told name and step of each completed checkpoint, on every rank, from the thread that trains.
    """

    def __init__(
        self, run_uri: str, identity: RunIdentity, ranks: Ranks, max_failed: int, report: Callable[[str, int], None]
    ) -> None:
        self.failed = 0
        """Failed saves since the last good one."""
        self.blocked_s = 0.0
        """Seconds that training has waited for checkpoints."""
        self._run_uri = run_uri
        self._identity = identity
        self._ranks = ranks
        self._uploads = Ranks(_UPLOAD_TIMEOUT_S)
        self._max_failed = max_failed
        self._report = report
        self._local = storage.is_local(run_uri)
        self._save: _Save | None = None
        self._thread: threading.Thread | None = None

    @property
    def is_done(self) -> bool:
        """Whether this rank has nothing under way; `settle` may be called once that is so on every rank."""
        return self._thread is None or not self._thread.is_alive()

    def save(self, engine: DeepSpeedEngine, progress: Progress) -> None:
        """Save a checkpoint; returns when the local files are written. Waits for the save before, if it must.

        Raises:
            CheckpointError: A rank cannot write its file, or too many saves in a row have failed.
        """
        self.settle()
        started = time.perf_counter()
        name = f"{PREFIX}{progress.step:08d}-{self._ranks.share(uuid.uuid4().hex[:8])}"
        rank, world_size = self._ranks.rank, self._ranks.world_size
        file = f"rank-{rank:05d}-of-{world_size:05d}.safetensors"
        problem: str | None = None
        folder: Path | None = None
        try:
            folder = self._make_folder(name)
            write_state(engine, folder / file)
        except (OSError, SafetensorError) as error:
            problem = f"rank {rank}, {folder / file if folder else file}: {error}"
        problems = [found for found in self._ranks.gather(problem) if found]
        if folder is None or problems:
            self._remove_folder(folder)
            raise CheckpointError(
                f"the checkpoint of step {progress.step} cannot be written ({'; '.join(problems)}); "
                "the checkpoints before it are as they were: make room and run the same command again"
            )
        manifest = CheckpointManifest(
            progress=progress, updates=count_updates(engine), run=self._identity, world_size=world_size, files=[]
        )
        self._save = _Save(name, folder, file, manifest)
        self._thread = threading.Thread(target=self._complete, args=(self._save,), name="checkpoint", daemon=True)
        self._thread.start()
        self.blocked_s += time.perf_counter() - started

    def settle(self) -> None:
        """Wait until the save under way, if any, is complete on every rank, and report it.

        Raises:
            CheckpointError: It failed, and it was one too many.
        """
        if self._thread is None or self._save is None:
            return
        started = time.perf_counter()
        save = self._save
        self._thread.join()
        self._thread = self._save = None
        if save.problem:
            self._count(save)
        else:
            self.failed = 0
            self._report(save.name, save.manifest.progress.step)
        self.blocked_s += time.perf_counter() - started

    def _make_folder(self, name: str) -> Path:
        if not self._local:
            return new_scratch(name)
        folder = Path(self._run_uri) / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def _remove_folder(self, folder: Path | None) -> None:
        if folder and self._local:
            shutil.rmtree(folder, ignore_errors=True)
        elif folder:
            remove_scratch(folder)

    def _count(self, save: _Save) -> None:
        self.failed += 1
        where = f"the checkpoint of step {save.manifest.progress.step} could not be saved ({save.problem})"
        if self._local or self.failed >= self._max_failed:
            in_a_row = "" if self._local else f", the {self.failed}. in a row (run.max_failed_saves)"
            raise CheckpointError(
                f"{where}{in_a_row}; the checkpoints before it are as they were: "
                "look after the storage and run the same command again"
            )
        self._ranks.say(f"{where}; training goes on, failed saves in a row: {self.failed} of {self._max_failed}")

    def _complete(self, save: _Save) -> None:
        """Steps 2 and 3, in a thread of every rank."""
        entry: FileEntry | str
        try:
            entry = self._hand_over(save)
        except (OSError, ValueError) as error:
            entry = f"rank {self._ranks.rank}: {error}"
        entries = self._uploads.gather(entry)
        problem = "; ".join(found for found in entries if isinstance(found, str)) or None
        if self._ranks.rank == 0 and not problem:
            manifest = save.manifest.model_copy(update={"files": entries})
            try:
                storage.write_bytes(
                    storage.join(self._run_uri, save.name, MANIFEST_NAME), manifest.model_dump_json(indent=1).encode()
                )
            except (OSError, ValueError) as error:
                problem = str(error)
        save.problem = self._uploads.share(problem)

    def _hand_over(self, save: _Save) -> FileEntry:
        path = save.folder / save.entry_name
        with path.open("rb") as file:
            os.fsync(file.fileno())  # the manifest must not outlive, in a power cut, what it vouches for
        entry = FileEntry(name=save.entry_name, bytes=path.stat().st_size, sha256=sha256_of(path))
        if not self._local:
            try:
                target = storage.join(self._run_uri, save.name, save.entry_name)
                file_system, target_path = storage.filesystem(target)
                with naming(target):
                    file_system.put_file(str(path), target_path)
            finally:
                self._remove_folder(save.folder)
        return entry
