"""Files of a local disk: found, and written whole or not at all, beside their place and then moved there."""

from __future__ import annotations

import errno
import glob
import os
import stat
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from fsspec.implementations.local import LocalFileSystem

# A local file this large is no part of the page cache once it is on the disk. What reads it comes much later, and else
# every shard would be written to memory that nobody has used before: on a virtual machine, ten times the cost of
# writing it. Where the data begins at a page and the file system can, it goes past the page cache from the start.
_UNCACHED = 2**20
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS)  # what exFAT, shares and drives in the cloud say
_PAGE = 4096  # bytes; a multiple of every disk's block


def replace_file(path: Path, data: bytes | memoryview) -> None:
    """Write the file `path`, replacing what is there. Raises OSError: the disk is full, or the place is closed."""
    os.replace(_write_beside(path, data), path)


def create_file(path: Path, data: bytes) -> bool:
    """Write the file `path` unless there is one; whether it was written.

    Raises OSError: as `replace_file`; or the file system has no hard links.
    """
    temporary = _write_beside(path, data)
    try:
        os.link(temporary, path)  # fails where the name exists, so the whole file appears at once and only once
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        remedy = "this file system has no hard links, by which a file is written only where none is; use another disk"
        raise OSError(errno.EOPNOTSUPP, remedy, str(path)) from error
    finally:
        temporary.unlink()
    return True


def match_files(pattern: str) -> list[str]:
    """The files that `pattern` matches, as a shell has it: * and ? follow links, ** does not.

    Links are files too where they lead to one, as all do in the cache of the Hugging Face hub; and where they lead
    nowhere, so that whoever reads them says so.

    Raises:
        PermissionError: a folder that it goes through may not be read; a shell would pass over it.
    """
    signs = pattern.replace("[", "[[]")  # of glob's signs, * and ? alone are ours
    _check_readable(signs)
    found = LocalFileSystem().glob(signs) if "**" in pattern else glob.glob(signs, include_hidden=True)
    return [name for name in found if os.path.isfile(name) or not os.path.exists(name)]


def files_below(folder: str, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[tuple[str, os.stat_result]]:
    """Paths of the files at any depth below `folder` with their facts, those that links lead to among them.

    Args:
        folder: where to look.
        above: device and inode of the folders that hold it: a link to one of them is passed over.
    """
    own = os.stat(folder)
    if (own.st_dev, own.st_ino) in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            try:
                facts = entry.stat()
            except OSError:  # of a link that leads nowhere: what reads it will say so
                facts = entry.stat(follow_symlinks=False)
            if stat.S_ISDIR(facts.st_mode):
                yield from files_below(entry.path, above | {(own.st_dev, own.st_ino)})
            else:
                yield entry.path, facts


def _check_readable(pattern: str) -> None:
    if "**" in pattern:
        for _ in os.walk(os.path.dirname(pattern[: pattern.index("**")]), onerror=_raise):
            pass
        return
    folder = pattern
    while glob.has_magic(folder):
        folder = os.path.dirname(folder)
        for found in glob.iglob(folder, include_hidden=True):
            if os.path.isdir(found) and not os.access(found, os.R_OK | os.X_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), found)


def _raise(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):  # where nothing is, nothing matches
        raise error


def _write_beside(path: Path, data: bytes | memoryview) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        done = _write_past_cache(temporary, data)
        with temporary.open("ab") as file:
            file.write(memoryview(data)[done:])
            file.flush()
            os.fsync(file.fileno())  # a receipt must not outlive, in a power cut, the shard that it vouches for
            if len(data) >= _UNCACHED and hasattr(os, "posix_fadvise"):  # Linux
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def _write_past_cache(path: Path, data: bytes | memoryview) -> int:
    """Write what of `data` can go straight from its pages to the disk to the new file `path`; returns how much."""
    whole_pages = len(data) // _PAGE * _PAGE
    is_aligned = np.frombuffer(data, np.uint8).ctypes.data % _PAGE == 0 if data else False
    if len(data) < _UNCACHED or not is_aligned or not hasattr(os, "O_DIRECT"):  # Linux has it
        return 0
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o666)
    except OSError as error:
        if error.errno != errno.EINVAL:  # so file systems say that they cannot
            raise
        return 0
    done = 0
    try:
        while done < whole_pages:
            done += os.write(file, memoryview(data)[done:whole_pages])
    finally:
        os.close(file)
    return done
