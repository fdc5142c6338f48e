"""Objects: read whole, in ranges or as files; written whole or not at all; put where there is none yet."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

from fsspec.implementations.local import LocalFileSystem

from pipelines.storage.disk import create_file, replace_file
from pipelines.storage.faults import StorageError, naming, pause, s3_error, whole_body
from pipelines.storage.stores import THREADS, filesystem, in_one_get, in_one_put

_CREATE_TRIES = 6
_CONFLICTS = ("ConditionalRequestConflict", "OperationAborted")


def exists(uri: str) -> bool:
    """Whether an object lies at `uri`."""
    file_system, path = filesystem(uri)
    with naming(uri):
        return file_system.exists(path)


def read_bytes(uri: str) -> bytes:
    """The whole object at `uri`.

    Raises:
        FileNotFoundError: there is none.
        PermissionError: it may not be read.
        StorageError: the store kept failing.
    """
    file_system, path = filesystem(uri)
    with naming(uri):
        return whole_body(lambda: file_system.cat_file(path, **in_one_get(file_system)))


def read_range(uri: str, start: int, stop: int) -> bytes:
    """The bytes of the object at `uri` from offset `start` up to `stop`; fewer where the object ends before.

    Raises: as `read_bytes`.
    """
    if start >= stop:
        return b""
    file_system, path = filesystem(uri)
    with naming(uri):
        try:
            data = whole_body(lambda: file_system.cat_file(path, start=start, end=stop))
        except OSError as error:
            if s3_error(error).get("Code") in ("InvalidRange", "416"):
                return b""
            raise
    if len(data) > stop - start:
        raise StorageError(f"{uri}: asked for bytes {start} to {stop}, got {len(data)}: this store ignores ranges")
    return data


def download(uri: str, path: Path) -> None:
    """Write the object at `uri` to the local file `path`, a little at a time: it is never whole in memory.

    Raises: as `read_bytes`; OSError: the disk is full.
    """
    file_system, remote = filesystem(uri)
    with naming(uri):
        whole_body(lambda: file_system.get_file(remote, str(path), **in_one_get(file_system)))


def read_many(uris: Sequence[str]) -> list[bytes]:
    """The objects at `uris`, in their order, many at a time."""
    with ThreadPoolExecutor(THREADS) as threads:
        return list(threads.map(read_bytes, uris))


def open_file(uri: str, block_bytes: int = 8 * 2**20) -> BinaryIO:
    """The object at `uri` as a file that can be read and sought; of an object store `block_bytes` at a time."""
    file_system, path = filesystem(uri)
    if isinstance(file_system, LocalFileSystem):
        return open(path, "rb")
    with naming(uri):
        size = file_system.size(path)
    return io.BufferedReader(_RangedFile(uri, size), block_bytes)  # type: ignore[return-value]  # typeshed's two worlds


def write_bytes(uri: str, data: bytes | memoryview, digest: str | None = None) -> None:
    """Write `data` at `uri`, replacing what is there; a reader sees the old object or the new one, never a part.

    Args:
        uri: where to.
        data: what.
        digest: its `sha256`, where that is known: S3 compares it with what arrives.

    Raises:
        OSError: the disk is full, or the place may not be written.
        StorageError: the store kept failing.
    """
    file_system, path = filesystem(uri)
    with naming(uri):
        if not isinstance(file_system, LocalFileSystem):
            file_system.pipe_file(path, bytes(data), **in_one_put(file_system, digest or sha256(data)))
            return
        replace_file(Path(path), data)


def put_if_absent(uri: str, data: bytes) -> bool:
    """Write `data` at `uri` unless an object is there. Whether `data` is what lies there now.

    Of several writers of different data exactly one gets True. The store's own word on who was first is not enough:
    where the answer to a request is lost, its repetition (in botocore or, unnoticed by all above it, in aiohttp) finds
    what the first one wrote. So an object that is there is read back.

    Raises:
        OSError: the disk is full, or the place may not be written.
        StorageError: the store kept failing, or gave no clear answer several times over.
    """
    return _create(uri, data) or read_bytes(uri) == data


def require_conditional_writes(uri: str) -> None:
    """Make sure that the store of the existing object `uri` honours put-if-absent: not every S3 look-alike does.

    Raises:
        StorageError: a second write of the same object was let through.
    """
    if _create(uri, read_bytes(uri)):
        raise StorageError(
            f"{uri}: this store overwrites where a write says 'only if absent' (If-None-Match), so two runs could undo "
            "each other's work; prepare into a store that supports conditional writes, or a local folder"
        )


def sha256(data: bytes | memoryview) -> str:
    """The hash that names and checks everything written here, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


class _RangedFile(io.RawIOBase):
    def __init__(self, uri: str, size: int) -> None:
        self._uri, self._size, self._position = uri, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = read_range(self._uri, self._position, min(self._position + len(buffer), self._size))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _create(uri: str, data: bytes) -> bool:
    """Whether a conditional write was let through."""
    file_system, path = filesystem(uri)
    with naming(uri):
        if isinstance(file_system, LocalFileSystem):
            return create_file(Path(path), data)
        for attempt in range(1, _CREATE_TRIES + 1):
            try:
                # Sends If-None-Match: *. S3 answers 412 where an object is, 409 where another write is under way.
                file_system.pipe_file(path, data, mode="create", **in_one_put(file_system, sha256(data)))
                return True
            except FileExistsError:
                return False
            except OSError as error:
                # s3fs makes 412 a FileExistsError only where the answer names the condition, which not all servers do.
                code = s3_error(error).get("Code")
                if code == "PreconditionFailed":
                    return False
                if code not in _CONFLICTS:
                    raise
            pause(attempt)
    raise StorageError(f"{uri}: the store kept answering 409 (conflict) to a conditional write; try again")
