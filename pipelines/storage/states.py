"""What tells whether an object is still what it was: its size and its stamp, listed many at a time, or read with it.

S3 lists a thousand objects in one request, and the answer that brings an object brings its state as well; a disk gives
both for the asking. So to compare costs no request of its own.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import xxhash
from fsspec.asyn import sync
from fsspec.implementations.local import LocalFileSystem

from pipelines import storage
from pipelines.storage.direct import DirectS3
from pipelines.storage.faults import StorageError, naming, whole_body

NO_REGULAR_FILE = errno.ENXIO
"""What errors say of a socket or a device."""
NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, NO_REGULAR_FILE)
"""What errors say of a name that stands for no object: a folder, a link in a circle, more letters than names have."""
_PAGE = 1000  # the most that S3 lists in one answer


class State(NamedTuple):
    """Of an object: `str` shows both, with the stamp in hexadecimal digits."""

    size: int
    """Bytes."""
    stamp: int
    """64 bits: of a file its time of modification in nanoseconds, of an S3 object the first half of its ETag."""

    def __str__(self) -> str:
        return f"{self.size}-{self.stamp:016x}"


class TooLargeError(StorageError):
    """An object has more bytes than may be read.

    Attributes:
        state: of the object.
    """

    def __init__(self, uri: str, most_bytes: int, state: State) -> None:
        super().__init__(f"{uri}: {state.size:,} bytes; at most {most_bytes:,} may be read")
        self.state = state


class ObjectFolder:
    """The objects below a folder, read again and again: opened once, it is cheaper than `storage.read_bytes`. Names are
    joined as paths: they are never parsed for protocols.

    Threads may read at once.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._file_system, path = storage.filesystem(uri)
        self._path = path.rstrip("/")
        self.is_local = isinstance(self._file_system, LocalFileSystem)
        self._is_s3 = "s3" in self._file_system.protocol

    @property
    def tells_states(self) -> bool:
        """Whether its objects come with their states: on a disk and in S3, of whatever make."""
        return self.is_local or self._is_s3

    def read(self, name: str, most_bytes: int | None = None) -> tuple[bytes, State | None]:
        """The whole object `name`, and its state at that time; None where the folder tells none.

        Raises:
            TooLargeError: it has more than `most_bytes`. Nothing of it is read. Only where the folder tells states.
            OSError: as `storage.read_bytes`; NO_REGULAR_FILE: a device, which would never end, or a socket.
            StorageError: the store kept failing.
        """
        path, uri = f"{self._path}/{name}", storage.join(self.uri, name)
        with naming(uri):
            if self.is_local:
                return _read(path, uri, most_bytes)
            if self._is_s3:
                return self._read_s3(path, uri, most_bytes)
            return whole_body(lambda: self._file_system.cat_file(path)), None

    def _read_s3(self, path: str, uri: str, most_bytes: int | None) -> tuple[bytes, State]:
        bucket, key, _ = self._file_system.split_path(path)
        found = DirectS3.of(self._file_system, bucket).get(key, most_bytes)
        if found is None:
            get = partial(_get, self._file_system, bucket, key, uri, most_bytes)
            return whole_body(lambda: sync(self._file_system.loop, get))
        state = State(found.size, _of_etag(found.etag))
        if found.data is None:
            raise TooLargeError(uri, most_bytes or 0, state)
        return found.data, state

    def states(self, folder: str) -> Iterator[tuple[str, State]]:
        """Names of the objects directly below `folder` of this one, with their states; none where there is no folder.

        Raises:
            PermissionError: it may not be listed.
            StorageError: the store kept failing.
        """
        path, uri = f"{self._path}/{folder}".rstrip("/"), storage.join(self.uri, folder)
        with naming(uri):
            if self.is_local:
                yield from _scan(path)
            else:
                yield from self._list(path)

    def _list(self, path: str) -> Iterator[tuple[str, State]]:
        bucket, key, _ = self._file_system.split_path(path)
        prefix = f"{key}/" if key else ""
        more: dict[str, Any] = {}
        while True:
            page = self._file_system.call_s3(
                "list_objects_v2", Bucket=bucket, Prefix=prefix, Delimiter="/", MaxKeys=_PAGE, **more
            )
            for found in page.get("Contents", []):
                yield found["Key"].removeprefix(prefix), State(found["Size"], _of_etag(found["ETag"]))
            if not page.get("IsTruncated"):
                return
            more = {"ContinuationToken": page["NextContinuationToken"]}


def _scan(path: str) -> Iterator[tuple[str, State]]:
    try:
        entries = os.scandir(path)
    except OSError as error:
        if error.errno not in NOT_THERE:
            raise
        return
    with entries:
        for entry in entries:
            try:
                if entry.is_file():
                    yield entry.name, _file_state(entry.stat())
            except OSError as error:  # a link that leads nowhere, or where nobody may look: what reads it will say so
                if error.errno not in (*NOT_THERE, errno.EACCES):
                    raise


def _read(path: str, uri: str, most_bytes: int | None) -> tuple[bytes, State]:
    with open(path, "rb", buffering=0) as file:
        facts = os.fstat(file.fileno())
        if not (stat.S_ISREG(facts.st_mode) or stat.S_ISFIFO(facts.st_mode)):  # a pipe ends when its writer does
            raise OSError(NO_REGULAR_FILE, "No regular file", path)
        if most_bytes is not None and facts.st_size > most_bytes:
            raise TooLargeError(uri, most_bytes, _file_state(facts))
        data = file.readall()
        return data, _file_state(os.fstat(file.fileno()))  # after reading: a change meanwhile is seen


def _file_state(facts: os.stat_result) -> State:
    return State(facts.st_size, facts.st_mtime_ns % 2**64)  # of a time before 1970 too


async def _get(file_system: Any, bucket: str, key: str, uri: str, most_bytes: int | None) -> tuple[bytes, State]:
    answer = await file_system._call_s3("get_object", Bucket=bucket, Key=key)
    state = State(answer["ContentLength"], _of_etag(answer["ETag"]))
    try:
        if most_bytes is not None and state.size > most_bytes:
            raise TooLargeError(uri, most_bytes, state)
        data = await answer["Body"].read()
    finally:
        answer["Body"].close()
    return data, state._replace(size=len(data))


def _of_etag(etag: str) -> int:
    text = etag.strip('"')
    try:
        return int(text[:16], 16)
    except ValueError:  # not every store makes them of hexadecimal digits
        return xxhash.xxh3_64_intdigest(text.encode())
