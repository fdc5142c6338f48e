"""Whole objects of S3 by a client in Rust, for a third to a fifth of botocore's CPU: a picture in less than a ms.

It is asked first, and once. Whatever it does not answer with a whole object, from a key that is missing to a storm of
503, is asked again by s3fs: the retries and the messages of `faults` are the only ones there are.
"""

from __future__ import annotations

import functools
import re
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from fsspec.asyn import sync
from obstore.exceptions import BaseError
from obstore.store import S3Store

# Others it might spell in another way, and find another object.
_PLAIN_KEY = re.compile(r"[\w.-]+(/[\w.-]+)*", re.ASCII)
# In credentials: botocore hands out none that expire within ten minutes, and obstore asks five minutes before the end.
_TRUST = timedelta(minutes=9)
_HOPELESS = 3  # failures before any answer: a region, a proxy, an authority or a setting that it does not know


class Found(NamedTuple):
    """An object as it was read."""

    size: int
    etag: str
    data: bytes | None
    """Its content; None where it has more bytes than may be read."""


class DirectS3:
    """The objects of a bucket. Threads may ask at once.

    Args:
        file_system: s3fs, whose endpoint, region, credentials and time limits are used.
        bucket: its name.
    """

    def __init__(self, file_system: Any, bucket: str) -> None:
        self._file_system = file_system
        self._bucket = bucket
        self._failures = 0  # before the first answer
        self._has_answered = False

    @functools.cached_property
    def _store(self) -> S3Store:
        """Raises `BaseError` where the environment has settings that it does not understand."""
        meta, limits = self._file_system.s3.meta, self._file_system.config_kwargs
        return S3Store(
            self._bucket,
            endpoint=meta.endpoint_url,
            region=meta.region_name,
            credential_provider=self._credential,
            client_options={
                "allow_http": meta.endpoint_url.startswith("http://"),
                "connect_timeout": timedelta(seconds=limits["connect_timeout"]),
                "read_timeout": timedelta(seconds=limits["read_timeout"]),
                "timeout": timedelta(hours=1),
            },
            retry_config={"max_retries": 0},
        )

    @staticmethod
    def of(file_system: Any, bucket: str) -> DirectS3:
        """The one of this process, with its connections."""
        return _of_client(file_system.s3, file_system, bucket)

    def get(self, key: str, most_bytes: int | None) -> Found | None:
        """The object `key`, of which nothing is read where it has more than `most_bytes`; None: s3fs must ask."""
        parts = key.split("/")
        if self._failures >= _HOPELESS or not _PLAIN_KEY.fullmatch(key) or "." in parts or ".." in parts:
            return None
        try:
            answer = self._store.get(key)
            size, etag = answer.meta["size"], answer.meta["e_tag"]
            data = bytes(answer.bytes()) if most_bytes is None or size <= most_bytes else None
        except (BaseError, OSError, ValueError) as error:
            if not self._has_answered and not isinstance(error, FileNotFoundError):
                self._failures += 1
            return None
        if etag is None or (data is not None and len(data) != size):
            return None
        self._has_answered = True
        return Found(size, etag, data)

    def _credential(self) -> Any:
        credentials = self._file_system.s3._request_signer._credentials
        if credentials is None:
            raise ValueError("no credentials")
        frozen = sync(self._file_system.loop, credentials.get_frozen_credentials)
        return {
            "access_key_id": frozen.access_key,
            "secret_access_key": frozen.secret_key,
            "token": frozen.token,
            "expires_at": datetime.now(UTC) + _TRUST,
        }


@functools.lru_cache(maxsize=64)
def _of_client(client: Any, file_system: Any, bucket: str) -> DirectS3:
    """`client` is of `file_system`: one with other environment is told from it by nothing else."""
    return DirectS3(file_system, bucket)
