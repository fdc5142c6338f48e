"""Bytes at a URI: a local path, `s3://bucket/key`, or any other place that fsspec knows.

Every object is written whole or not at all: an object store publishes a PUT when it is complete, and a local file is
written beside its place and moved there (`disk`).

Every wait is bounded, transient faults are tried again with jitter, and what fails for good names its object
(`faults`). Credentials come from the environment alone (`stores`).
"""

from pipelines.storage.faults import StorageError
from pipelines.storage.listings import (
    fingerprint,
    folder_fingerprint,
    is_pattern,
    list_files,
    list_names,
    list_sizes,
    match,
)
from pipelines.storage.objects import (
    download,
    exists,
    open_file,
    put_if_absent,
    read_bytes,
    read_many,
    read_range,
    require_conditional_writes,
    sha256,
    write_bytes,
)
from pipelines.storage.stores import filesystem, is_local, join, resolve

__all__ = [
    "StorageError",
    "download",
    "exists",
    "filesystem",
    "fingerprint",
    "folder_fingerprint",
    "is_local",
    "is_pattern",
    "join",
    "list_files",
    "list_names",
    "list_sizes",
    "match",
    "open_file",
    "put_if_absent",
    "read_bytes",
    "read_many",
    "read_range",
    "require_conditional_writes",
    "resolve",
    "sha256",
    "write_bytes",
]
