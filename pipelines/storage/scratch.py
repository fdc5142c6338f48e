"""Scratch folders: what is on its way between this machine and a store lies in one, often tens of gigabytes.

Each is held by the processes that use it, which the kernel lets go of at their death. So what a killed process left is
told from what another one uses, and goes when the next scratch folder is made beside it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

_PREFIX = "flashsloth-scratch-"
_HELD: dict[Path, int] = {}  # folder -> descriptor, whose lock says that this process uses it


@contextlib.contextmanager
def scratch(purpose: str) -> Iterator[Path]:
    """A new scratch folder, which is gone at the end of the block."""
    folder = new_scratch(purpose)
    try:
        yield folder
    finally:
        remove_scratch(folder)


def new_scratch(purpose: str, word: str | None = None, parent: Path | None = None) -> Path:
    """A scratch folder, held until `remove_scratch` or the death of this process.

    Args:
        purpose: a part of its name, for people.
        word: processes of this machine that name the same share one folder; default is one of its own.
        parent: where it is made, and what killed processes left goes; default the system's folder for temporary files.

    Raises:
        OSError: it cannot be made.
    """
    parent = parent or Path(tempfile.gettempdir())
    _sweep(parent)
    folder = parent / f"{_PREFIX}{purpose}-{word or uuid.uuid4().hex}"
    while folder not in _HELD:
        folder.mkdir(mode=0o700, exist_ok=True)
        descriptor = _hold(folder)
        if descriptor is not None:
            _HELD[folder] = descriptor
    return folder


def remove_scratch(folder: Path) -> None:
    """No longer hold `folder`, which may have been renamed; the last one to do so removes it. Others are left alone."""
    descriptor = _HELD.pop(folder, None)
    if descriptor is None:
        return
    try:
        if _is_ours_alone(descriptor):
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(descriptor)


def _hold(folder: Path) -> int | None:
    """A descriptor of `folder` that is locked for this process; None where somebody has just swept it away."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None
    # Some file systems have no locks. Nobody sweeps there either.
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_SH)
    with contextlib.suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(descriptor), folder.stat()):
            return descriptor
    os.close(descriptor)
    return None


def _is_ours_alone(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return not isinstance(error, BlockingIOError)
    return True


def _sweep(parent: Path) -> None:
    """Remove the scratch folders in `parent` that no process holds."""
    for folder in parent.glob(f"{_PREFIX}*"):
        with contextlib.suppress(OSError):  # another user's, or gone
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
            finally:
                os.close(descriptor)
