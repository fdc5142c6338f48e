"""Bytes at a URI: a local path, `s3://bucket/key`, or any other place that fsspec knows.

S3's endpoint, region and keys come from the environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`,
`AWS_SECRET_ACCESS_KEY`), or from the machine's role; they are never arguments, so they reach no recipe and no log.

Every object is written whole or not at all: an object store publishes a PUT when it is complete, and a local file is
written beside its place and renamed into it.
"""

from __future__ import annotations

import hashlib
import os
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem

# Listings are never cached: a resumed run must see what another machine wrote a moment ago. Standard retries back off
# with jitter and cover throttling (503), timeouts and connections that break off.
_OPTIONS = {
    "s3": {"use_listings_cache": False, "config_kwargs": {"retries": {"mode": "standard", "max_attempts": 8}}},
    "s3a": {"use_listings_cache": False, "config_kwargs": {"retries": {"mode": "standard", "max_attempts": 8}}},
}
_CREATE_TRIES = 6


class StorageError(ValueError):
    """A place cannot do what preparation needs of it; the message names the place."""


def filesystem(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system that holds `uri`, and the path of `uri` on it."""
    protocol = uri.partition("://")[0] if "://" in uri else "file"
    return fsspec.core.url_to_fs(uri, **_OPTIONS.get(protocol, {}))


def is_local(uri: str) -> bool:
    """Whether `uri` names a path on this machine."""
    return isinstance(filesystem(uri)[0], LocalFileSystem)


def resolve(uri: str) -> str:
    """`uri` as any process can read it: a local path made absolute (workers have another working directory)."""
    file_system, path = filesystem(uri)
    return path if isinstance(file_system, LocalFileSystem) else uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    """`uri` with `parts` below it."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


def exists(uri: str) -> bool:
    """Whether an object lies at `uri`."""
    file_system, path = filesystem(uri)
    return file_system.exists(path)


def read_bytes(uri: str) -> bytes:
    """The whole object at `uri`. Raises FileNotFoundError or PermissionError."""
    file_system, path = filesystem(uri)
    return file_system.cat_file(path)


def read_many(uris: Sequence[str]) -> list[bytes]:
    """The objects at `uris`, in their order; on an object store they are fetched together."""
    if not uris:
        return []
    file_system = filesystem(uris[0])[0]
    paths = [filesystem(uri)[1] for uri in uris]
    found = file_system.cat(paths, on_error="raise")
    return [found[path] for path in paths] if isinstance(found, dict) else [found]


def list_names(uri: str) -> list[str]:
    """Names of the objects directly below `uri`, sorted; an empty list where the folder does not exist."""
    file_system, path = filesystem(uri)
    try:
        return sorted(entry.rstrip("/").rpartition("/")[2] for entry in file_system.ls(path, detail=False))
    except FileNotFoundError:
        return []


def fingerprint(uri: str) -> str:
    """What changes when the object at `uri` changes: its size with its ETag, or with its time of modification."""
    file_system, path = filesystem(uri)
    facts = file_system.info(path)
    stamp = facts.get("ETag") or facts.get("etag") or facts.get("mtime") or facts.get("LastModified")
    return f"{facts['size']}-{str(stamp).strip(chr(34))}"


def write_bytes(uri: str, data: bytes | memoryview) -> None:
    """Write `data` at `uri`, replacing what is there; a reader sees the old object or the new one, never a part."""
    file_system, path = filesystem(uri)
    if not isinstance(file_system, LocalFileSystem):
        file_system.pipe_file(path, bytes(data))
        return
    temporary = _write_beside(Path(path), data)
    os.replace(temporary, path)


def put_if_absent(uri: str, data: bytes) -> bool:
    """Write `data` at `uri` unless an object is there; of several writers at once exactly one gets True.

    Raises:
        StorageError: the store gave no clear answer, several times over.
    """
    file_system, path = filesystem(uri)
    if isinstance(file_system, LocalFileSystem):
        return _link_if_absent(Path(path), data)
    for attempt in range(_CREATE_TRIES):
        try:
            # Sends If-None-Match: *. S3 answers 412 where an object is, 409 where another write is under way.
            file_system.pipe_file(path, data, mode="create")
            return True
        except FileExistsError:
            return False
        except OSError as error:
            if _s3_code(error) == "PreconditionFailed":
                return False
            if _s3_code(error) not in ("ConditionalRequestConflict", "OperationAborted"):
                raise
        time.sleep(0.05 * 2**attempt)
    raise StorageError(f"{uri}: the store kept answering 409 (conflict) to a conditional write; try again")


def require_conditional_writes(uri: str) -> None:
    """Make sure that the store of the existing object `uri` honours put-if-absent: not every S3 look-alike does.

    Raises:
        StorageError: a second write of the same object was let through.
    """
    if put_if_absent(uri, read_bytes(uri)):
        raise StorageError(
            f"{uri}: this store overwrites where a write says 'only if absent' (If-None-Match), so two runs could undo "
            "each other's work; prepare into a store that supports conditional writes, or a local folder"
        )


def sha256(data: bytes | memoryview) -> str:
    """The hash that names and checks everything written here, as 64 hexadecimal digits."""
    return hashlib.sha256(data).hexdigest()


def _s3_code(error: OSError) -> str | None:
    # s3fs makes 412 a FileExistsError only where the answer names the condition, which not every server does.
    answer = getattr(error.__cause__, "response", None)
    return answer["Error"].get("Code") if answer else None


def _link_if_absent(path: Path, data: bytes) -> bool:
    temporary = _write_beside(path, data)
    try:
        os.link(temporary, path)  # fails where the name exists, so the whole file appears at once and only once
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True


def _write_beside(path: Path, data: bytes | memoryview) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # a receipt must not outlive, in a power cut, the shard that it vouches for
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary
