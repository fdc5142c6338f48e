"""Which store holds a URI, and how it is asked: one place for its options.

S3's endpoint, region and keys come from the environment (`AWS_ENDPOINT_URL`, `AWS_ACCESS_KEY_ID`,
`AWS_SECRET_ACCESS_KEY`), or from the machine's role; they are never arguments, so they reach no recipe and no log.
"""

from __future__ import annotations

import base64
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipelines.storage.faults import StorageError

THREADS = 16
"""Requests at a time: an object store answers in tens of milliseconds."""
# Listings are never cached: a resumed run must see what another machine wrote a moment ago.
_S3_OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,
    "config_kwargs": {
        "connect_timeout": 10,  # seconds
        "read_timeout": 30,  # seconds without a byte
        "retries": {"mode": "standard", "total_max_attempts": 6},
        "max_pool_connections": 2 * THREADS,
        # The signature covers the header that holds the body's sha256 (`in_one_put`), so it need not be hashed again.
        "s3": {"payload_signing_enabled": False},
    },
}
_OPTIONS: dict[str, dict[str, Any]] = {
    **{protocol: _S3_OPTIONS for protocol in ("s3", "s3a")},
    **{protocol: {"use_listings_cache": False} for protocol in ("gs", "gcs")},
}
_EXTRAS = {"gs": "gcs", "gcs": "gcs"}  # of pyproject.toml; what hf:// needs, transformers brings
# Kept for good. fsspec forgets its own in a process that was forked, where they would be taken down and let go of the
# connections that they share with the parent: which would then wait for an answer in vain until `read_timeout`.
_KEPT: dict[int, fsspec.AbstractFileSystem] = {}
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
    _KEPT[id(file_system)] = file_system
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


def afresh(uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """As `filesystem`, without what it may remember of listings: the Hugging Face hub's always does."""
    file_system, path = filesystem(uri)
    file_system.invalidate_cache()
    return file_system, path


def in_one_get(file_system: fsspec.AbstractFileSystem) -> dict[str, int]:
    """Arguments of a read that make it one request.

    s3fs would ask for the size first, and read a large object in parts that may be of two versions.
    """
    return {"max_concurrency": 1} if _is_s3(file_system) else {}


def in_one_put(file_system: fsspec.AbstractFileSystem, digest: str) -> dict[str, Any]:
    """Arguments of a write that make it one request, whose body S3 compares with `digest`, its `sha256`."""
    if not _is_s3(file_system):
        return {}
    return {"chunksize": _ONE_PUT, "ChecksumSHA256": base64.b64encode(bytes.fromhex(digest)).decode()}


def _is_s3(file_system: fsspec.AbstractFileSystem) -> bool:
    return "s3" in file_system.protocol
