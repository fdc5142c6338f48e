"""What lies below a folder or a prefix, or matches a pattern, and by what it is told from its next version."""

from __future__ import annotations

import errno
import os
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from pipelines.storage.disk import files_below, match_files
from pipelines.storage.faults import StorageError, naming
from pipelines.storage.objects import sha256
from pipelines.storage.stores import afresh, filesystem

# What tells two versions of an object apart, by store: S3, Google, the Hugging Face hub, a local disk, others.
_STAMPS = ("ETag", "etag", "blob_id", "mtime", "LastModified", "last_modified", "created")


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
    file_system, path = afresh(uri)
    try:
        with naming(uri):
            found = file_system.ls(path, detail=True)
    except FileNotFoundError:
        return {}
    return {entry["name"].rpartition("/")[2]: entry["size"] for entry in found if entry["type"] == "file"}


def list_files(folder: str) -> dict[str, str]:
    """The objects at any depth below `folder`: their names below it -> their fingerprints, in the order of names.

    Raises: as `read_bytes`.
    """
    file_system, path = afresh(folder)
    with naming(folder):
        if isinstance(file_system, LocalFileSystem):
            found = {name: {"size": facts.st_size, "mtime": facts.st_mtime} for name, facts in files_below(path)}
        else:
            found = file_system.find(path, detail=True)
        if not found and not file_system.exists(path):
            raise FileNotFoundError(folder)
    root = path.rstrip("/") + "/"
    return {name.removeprefix(root): _fingerprint(found[name], name) for name in sorted(found)}


def is_pattern(uri: str) -> bool:
    """Whether `uri` stands for all objects that it matches."""
    return "*" in uri or "?" in uri


def match(pattern: str) -> dict[str, str]:
    """The objects that `pattern` matches: their names below its fixed part -> their URIs, in the order of names."""
    file_system, path = afresh(pattern)
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


def fingerprint(uri: str) -> str:
    """What changes when the object at `uri` changes: its size with its ETag, or with its time of modification.

    Raises:
        IsADirectoryError: it is a folder, or a prefix; see `folder_fingerprint`.
        OSError, StorageError: as `read_bytes`.
    """
    file_system, path = afresh(uri)
    with naming(uri):
        facts = file_system.info(path)
    if facts["type"] == "directory":
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), uri)
    return _fingerprint(facts, uri)


def folder_fingerprint(files: dict[str, str]) -> str:
    """The fingerprint of the folder that `list_files` has found `files` in: their number, and a hash over all."""
    return f"{len(files)}-{sha256(repr(files).encode())}"


def _fingerprint(facts: dict[str, Any], uri: str) -> str:
    stamp = next((facts[name] for name in _STAMPS if facts.get(name) is not None), None)
    if stamp is None:
        raise StorageError(f"{uri}: this store tells neither a hash nor a time, so a change could go unnoticed")
    return f"{facts['size']}-{str(stamp).strip(chr(34))}"
