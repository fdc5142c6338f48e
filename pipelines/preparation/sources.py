"""Sources as a plan knows them: their files with fingerprints, and which of a file's rows are taken."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b

from fsspec.utils import glob_translate
from pydantic import BaseModel, ConfigDict

from pipelines import storage
from pipelines.corpora import images
from pipelines.preparation.settings import SourceSettings
from pipelines.records import FileFormatError
from pipelines.storage.faults import StorageError

_THREADS = 16  # an object store answers in tens of milliseconds


class PlanError(ValueError):
    """The plan cannot be made, or it is not the plan of the folder that it is meant for."""


class SourceTerms(BaseModel):
    """One file of a source as it was when the plan was made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """First part of its rows' keys: the source's name, and where the source has several files, `/` and the file's."""
    format: str
    path: str
    image_root: str | None
    limit: int | None
    weight: float = 1.0
    gif: bool = False
    fingerprint: str

    @property
    def corpus(self) -> str:
        """Name of the source that the file belongs to."""
        return self.name.partition("/")[0]


def source_terms(sources: Sequence[SourceSettings]) -> list[SourceTerms]:
    """The files of `sources`, in order, each with its fingerprint.

    Raises:
        PlanError: there is no such file, it may not be read or is a folder, its name is not UTF-8, or two sources have
            it.
    """
    named = [(source, *each) for source in sources for each in _files(source)]
    seen: dict[str, str] = {}
    for source, name, path in named:
        other = seen.setdefault(_place(path), name)
        if other != name:
            raise PlanError(f"source '{source.name}': {path} belongs to source '{other}' too; list each file once")
    with ThreadPoolExecutor(_THREADS) as threads:
        return list(threads.map(_file_terms, named))


def check_output(sources: Sequence[SourceSettings], output: str, written: Sequence[str]) -> None:
    """Raise PlanError where a source's pattern matches an object that is `written` below `output`.

    The next run would take it for a part of the corpus.
    """
    for source in sources:
        if not storage.is_pattern(source.path):
            continue
        signs = re.compile(glob_translate(_place(source.path).replace("[", "[[]")))
        taken = next((name for name in written if signs.match(_place(storage.join(output, name)))), None)
        if taken is not None:
            raise PlanError(
                f"source '{source.name}': {source.path} matches {storage.join(output, taken)}, which will be written "
                "there: choose another output, or a pattern that does not match it"
            )


def check_unchanged(source: SourceTerms, path: str) -> None:
    """Raise PlanError unless the file at `path`, or the folder, is what it was when the plan was made."""
    # A folder is listed once per process: its rows come out of that listing, which therefore is what counts.
    is_folder = source.format == "images"
    now = images.fingerprint(path, source.fingerprint) if is_folder else storage.fingerprint(path)
    if now != source.fingerprint:
        raise PlanError(
            f"source '{source.name}': {source.path} has changed since the plan was made (size and stamp then "
            f"{source.fingerprint}, now {now}); prepare it as it is now into another output"
        )


def source_differences(planned: Sequence[SourceTerms], now: Sequence[SourceTerms]) -> Iterator[str]:
    """One line for every file that only one of both has, and per field in which a file differs."""
    was, found = ({source.name: source for source in sources} for sources in (planned, now))
    for name in {**was, **found}:
        if name not in found:
            yield f"source '{name}' ({was[name].path}): was there, now missing"
        elif name not in was:
            yield f"source '{name}' ({found[name].path}): was not there"
        else:
            before, after = was[name].model_dump(), found[name].model_dump()
            yield from (
                f"source '{name}' ({was[name].path}): {field}: was {before[field]!r}, now {after[field]!r}"
                for field in before
                if before[field] != after[field]
            )
    if was.keys() == found.keys() and list(was) != list(found):
        yield "sources: now in another order"


def row_key(source: str, position: int, repeat: int = 0) -> str:
    """The key of a row: its source and its place in it. The corpus's own id may repeat, this cannot.

    Where a row is taken once more, its key says so: `mix:12`, `mix:12+1`.
    """
    return f"{source}:{position}" + (f"+{repeat}" if repeat else "")


def is_taken(source: SourceTerms, position: int, repeat: int) -> bool:
    """Whether the row at `position` is taken, for the first time (`repeat` 0) or once more, by the source's weight.

    It is decided by a hash of the row's key, so it hangs on no other row, and a higher weight keeps what a lower took.
    """
    share = source.weight - repeat
    if share >= 1:
        return True
    digest = blake2b(row_key(source.name, position).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < share * 2**64


def _files(source: SourceSettings) -> Iterator[tuple[str, str]]:
    if not storage.is_pattern(source.path):
        yield source.name, source.path
        return
    found = storage.match(source.path)
    if not found:
        raise PlanError(f"source '{source.name}': no file matches {source.path}")
    for name, path in found.items():
        if not _is_utf8(name):
            raise PlanError(f"source '{source.name}': the name of {path!r} is not UTF-8, as a row's key is; rename it")
        yield f"{source.name}/{name}", path


def _is_utf8(name: str) -> bool:
    """Whether `name` is text: of other bytes in a file's name, Python makes halves of surrogate pairs."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _place(path: str) -> str:
    """What all spellings of a file's path have in common: /x is file:///x, and s3a://b/k is s3://b/k."""
    file_system, place = storage.filesystem(path)
    return os.path.realpath(place) if storage.is_local(path) else f"{type(file_system).__name__}:{place}"


_PATTERNS = {"parquet": "*.parquet", "webdataset": "*.tar"}


def _file_terms(named: tuple[SourceSettings, str, str]) -> SourceTerms:
    source, name, path = named
    try:
        fingerprint = images.fingerprint(path) if source.format == "images" else storage.fingerprint(path)
    except (FileNotFoundError, PermissionError) as error:
        raise PlanError(f"source '{source.name}': {path} cannot be read ({type(error).__name__})") from error
    except IsADirectoryError as error:
        raise PlanError(
            f"source '{source.name}': {path} is a folder; for all of its files write a pattern, such as "
            f"{storage.join(path, _PATTERNS.get(source.format, '*.json'))}"
        ) from error
    except NotADirectoryError as error:
        below = "; images are read from a folder" if source.format == "images" else ""
        raise PlanError(f"source '{source.name}': {path} is not below a folder, or none itself{below}") from error
    except (StorageError, FileFormatError):  # which name the path themselves
        raise
    except ValueError as error:  # such as the hub's, of a path that can be none of its own
        raise PlanError(f"source '{source.name}': {path}: {error}") from error
    return SourceTerms(**{**source.model_dump(), "name": name, "path": path}, fingerprint=fingerprint)
