"""Bytes at a URI: a local path, `s3://bucket/key`, or any other place that fsspec knows.

S3's endpoint, region and keys come from the environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`,
`AWS_SECRET_ACCESS_KEY`), or from the machine's role; they are never arguments, so they reach no recipe and no log.

Every object is written whole or not at all: an object store publishes a PUT when it is complete, and a local file is
written beside its place and moved there (`pipelines.storage_disk`).

Every wait is bounded, transient faults are tried again with jitter, and what fails for good names its object
(`pipelines.storage_faults`).
"""

from __future__ import annotations

import base64
import errno
import hashlib
import io
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipelines.storage_disk import create_file, files_below, match_files, replace_file
from pipelines.storage_faults import StorageError, naming, pause, s3_error, whole_body

_THREADS = 16  # an object store answers in tens of milliseconds
# Listings are never cached: a resumed run must see what another machine wrote a moment ago.
_S3_OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,
    "config_kwargs": {
        "connect_timeout": 10,  # seconds
        "read_timeout": 30,  # seconds without a byte
        "retries": {"mode": "standard", "total_max_attempts": 6},
        "max_pool_connections": 2 * _THREADS,
        # The signature covers the header that holds the body's sha256 (`_in_one_put`), so it need not be hashed again.
        "s3": {"payload_signing_enabled": False},
    },
}
_OPTIONS: dict[str, dict[str, Any]] = {
    **{protocol: _S3_OPTIONS for protocol in ("s3", "s3a")},
    **{protocol: {"use_listings_cache": False} for protocol in ("gs", "gcs")},
}
_EXTRAS = {"gs": "gcs", "gcs": "gcs"}  # of pyproject.toml; what hf:// needs, transformers brings
# What tells two versions of an object apart, by store: S3, Google, the Hugging Face hub, a local disk, others.
_STAMPS = ("ETag", "etag", "blob_id", "mtime", "LastModified", "last_modified", "created")
_CREATE_TRIES = 6
_CONFLICTS = ("ConditionalRequestConflict", "OperationAborted")
_ONE_PUT = 5 * 2**30  # the largest object that S3 takes in one request, which leaves no parts behind when it fails


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system that holds `uri`, and the path of `uri` on it.

    Raises:
        StorageError: nothing that is installed knows `uri`'s protocol; the message says what to install.
    """
    protocol = uri.partition("://")[0] if "://" in uri else "file"
    if protocol in LocalFileSystem.protocol:  # fsspec would take a :: in a file's name for one store in another
        disk = fsspec.filesystem("file")
        return disk, disk._strip_protocol(uri)
    try:
        file_system, path = fsspec.core.url_to_fs(uri, **_OPTIONS.get(protocol, {}))
    except (ImportError, ValueError) as error:
        extra = _EXTRAS.get(protocol)
        remedy = f"pip install 'flashsloth[{extra}]'" if extra else str(error)
        raise StorageError(f"{uri}: nothing that is installed knows {protocol}://; {remedy}") from error
    if _is_s3(file_system):
        file_system.retries = 1  # s3fs would repeat what botocore has given up on, and multiply the attempts
    return file_system, path


def is_local(uri: str) -> bool:
    """Whether `uri` names a path on this machine."""
    return isinstance(filesystem(uri)[0], LocalFileSystem)


def resolve(uri: str) -> str:
    """`uri` as any process can read it: a local path made absolute (workers have another working directory)."""
    file_system, path = filesystem(uri)
    return path if isinstance(file_system, LocalFileSystem) else uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """`uri` with `parts`, at least one, below it."""
    below = "/".join(part.strip("/") for part in parts)
    return uri + below if uri.endswith("://") else f"{uri.rstrip('/')}/{below}"


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
        return whole_body(lambda: file_system.cat_file(path, **_in_one_get(file_system)))


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
        whole_body(lambda: file_system.get_file(remote, str(path), **_in_one_get(file_system)))


def read_many(uris: Sequence[str]) -> list[bytes]:
    """The objects at `uris`, in their order, many at a time."""
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(read_bytes, uris))


def open_file(uri: str, block_bytes: int = 8 * 2**20) -> BinaryIO:
    """The object at `uri` as a file that can be read and sought; of an object store `block_bytes` at a time."""
    file_system, path = filesystem(uri)
    if isinstance(file_system, LocalFileSystem):
        return open(path, "rb")
    with naming(uri):
        size = file_system.size(path)
    return io.BufferedReader(_RangedFile(uri, size), block_bytes)  # type: ignore[return-value]  # typeshed's two worlds


def list_names(uri: str) -> list[str]:
    """Names of the objects directly below `uri`, sorted; an empty list where the folder does not exist."""
    file_system, path = filesystem(uri)
    try:
        with naming(uri):
            return sorted(entry.rstrip("/").rpartition("/")[2] for entry in file_system.ls(path, detail=False))
    except FileNotFoundError:
        return []


def list_sizes(uri: str) -> dict[str, int]:
    """The objects directly below `uri`: their names -> their bytes; empty where the folder does not exist."""
    file_system, path = _afresh(uri)
    try:
        with naming(uri):
            found = file_system.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    return {entry["name"].rpartition("/")[2]: entry["size"] for entry in found if entry["type"] == "file"}


def is_pattern(uri: str) -> bool:
    """Whether `uri` stands for all objects that it matches."""
    return "*" in uri or "?" in uri


def match(pattern: str) -> dict[str, str]:
    """The objects that `pattern` matches: their names below its fixed part -> their URIs, in the order of names."""
    file_system, path = _afresh(pattern)
    fixed = path[: min(path.find(sign) for sign in "*?" if sign in path)].rpartition("/")[0]
    with naming(pattern):
        if isinstance(file_system, LocalFileSystem):
            return {name.removeprefix(fixed).lstrip("/"): name for name in sorted(match_files(path))}
        try:
            found = file_system.glob(path.replace("[", "[[]"), detail=True)  # of glob's signs, * and ? alone are ours
        except ValueError as error:  # such as "Cannot traverse all of S3", where the bucket is a part of the pattern
            raise StorageError(f"{pattern}: cannot be looked for ({error})") from error
    files = sorted(name for name, facts in found.items() if facts["type"] == "file")
    protocol = pattern[: pattern.index("://") + 3]
    return {name.removeprefix(fixed).lstrip("/"): protocol + name for name in files}


def list_files(folder: str) -> dict[str, str]:
    """The objects at any depth below `folder`: their names below it -> their fingerprints, in the order of names.

    Raises: as `read_bytes`.
    """
    file_system, path = _afresh(folder)
    with naming(folder):
        if isinstance(file_system, LocalFileSystem):
            found = {name: {"size": facts.st_size, "mtime": facts.st_mtime} for name, facts in files_below(path)}
        else:
            found = file_system.find(path, detail=True)
        if not found and not file_system.exists(path):
            raise FileNotFoundError(folder)
    root = path.rstrip("/") + "/"
    return {name.removeprefix(root): _fingerprint(found[name], name) for name in sorted(found)}


def fingerprint(uri: str) -> str:
    """What changes when the object at `uri` changes: its size with its ETag, or with its time of modification.

    Raises:
        IsADirectoryError: it is a folder, or a prefix; see `folder_fingerprint`.
        OSError, StorageError: as `read_bytes`.
    """
    file_system, path = _afresh(uri)
    with naming(uri):
        facts = file_system.info(path)
    if facts["type"] == "directory":
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), uri)
    return _fingerprint(facts, uri)


def folder_fingerprint(files: dict[str, str]) -> str:
    """The fingerprint of the folder that `list_files` has found `files` in: their number, and a hash over all."""
    return f"{len(files)}-{sha256(repr(files).encode())}"


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
            file_system.pipe_file(path, bytes(data), **_in_one_put(file_system, digest or sha256(data)))
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


def _afresh(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """As `filesystem`, without what it may remember of listings: the Hugging Face hub's always does."""
    file_system, path = filesystem(uri)
    file_system.invalidate_cache()
    return file_system, path


def _fingerprint(facts: dict[str, Any], uri: str) -> str:
    stamp = next((facts[name] for name in _STAMPS if facts.get(name) is not None), None)
    if stamp is None:
        raise StorageError(f"{uri}: this store tells neither a hash nor a time, so a change could go unnoticed")
    return f"{facts['size']}-{str(stamp).strip(chr(34))}"


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
                file_system.pipe_file(path, data, mode="create", **_in_one_put(file_system, sha256(data)))
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


def _is_s3(file_system: fsspec.AbstractFileSystem) -> bool:
    return "s3" in file_system.protocol


def _in_one_get(file_system: fsspec.AbstractFileSystem) -> dict[str, int]:
    # s3fs would ask for the size first, and read a large object in parts that may be of two versions.
    return {"max_concurrency": 1} if _is_s3(file_system) else {}


def _in_one_put(file_system: fsspec.AbstractFileSystem, digest: str) -> dict[str, Any]:
    if not _is_s3(file_system):
        return {}
    return {"chunksize": _ONE_PUT, "ChecksumSHA256": base64.b64encode(bytes.fromhex(digest)).decode()}
