"""Shards of an object store, kept on this machine in a folder of bounded size. Processes and datasets may share it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

_ABANDONED_S = 3600
"""A part into which nothing was written for so long is a killed process's: every wait of a fetch is much shorter."""


class ShardCache:
    """Files named by their content, so an entry is never stale.

    Args:
        folder: default is `flashsloth/shards` below `$XDG_CACHE_HOME` or `~/.cache`.
        max_bytes: the least recently used files leave when the folder outgrows this.
    """

    def __init__(self, folder: str | None, max_bytes: int) -> None:
        self.folder = Path(folder) if folder else _default_folder()
        self.max_bytes = max_bytes

    def has(self, sha256: str) -> bool:
        """Whether the shard with hash `sha256` is here."""
        return self._path(sha256).exists()

    def get(self, sha256: str, size: int, fetch: Callable[[Path], None]) -> Path:
        """The file of the shard with hash `sha256` and `size` bytes, written by `fetch` if it is not here."""
        path = self._path(sha256)
        if not _is_touched(path):
            with self._turn(path):  # whoever comes meanwhile waits, and then finds it
                if not _is_touched(path):
                    self._store(path, size, fetch)
        return path

    def _path(self, sha256: str) -> Path:
        return self.folder / f"{sha256}.arrow"

    @contextlib.contextmanager
    def _turn(self, path: Path) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock")
        with lock.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
                # Not left to the closing of the file: a process that was forked meanwhile has it open, too, and would
                # hold the lock, for which it may itself wait.
                fcntl.flock(file, fcntl.LOCK_UN)

    def _store(self, path: Path, size: int, fetch: Callable[[Path], None]) -> None:
        self._make_room(size)
        # Renamed, so that nobody reads a part; should two fetch one shard after all, their bytes are equal.
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        try:
            fetch(temporary)
            _touch(temporary)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def _make_room(self, needed: int) -> None:
        used: dict[str, tuple[float, int]] = {}
        for file in os.scandir(self.folder):
            with contextlib.suppress(FileNotFoundError):  # another process makes room at the same time
                facts = file.stat()
                if file.name.endswith(".arrow"):
                    used[file.path] = (facts.st_mtime, facts.st_size)
                elif file.name.endswith(".part") and facts.st_mtime < time.time() - _ABANDONED_S:
                    os.unlink(file.path)
        held = sum(size for _, size in used.values())
        for path, (_, size) in sorted(used.items(), key=lambda item: item[1]):
            if held + needed <= self.max_bytes:
                return
            Path(path).unlink(missing_ok=True)  # a process that has it mapped keeps its pages
            held -= size


def _is_touched(path: Path) -> bool:
    try:
        _touch(path)
    except FileNotFoundError:
        return False
    return True


def _touch(path: Path) -> None:
    """Note the time of last use, by which the cache forgets; finer than the kernel's own stamp."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))


def _default_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flashsloth" / "shards"
