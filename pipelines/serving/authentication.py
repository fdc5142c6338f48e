"""Who asks: bearer tokens, of which only hashes are kept, and how often each client may ask.

A token is 32 random bytes, so one round of sha256 is enough: there is nothing to guess, as in a password there is.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import secrets
import time
from collections.abc import Callable, Mapping

from pipelines.serving.errors import ApiError

_PREFIX = "fs-"
_MOST_BUCKETS = 10_000


def new_token() -> str:
    """A token that nobody has yet."""
    return _PREFIX + secrets.token_urlsafe(32)


def hash_token(token: str) -> str:
    """What is kept of a token: its sha256 in hex."""
    return hashlib.sha256(token.encode()).hexdigest()


class Clients:
    """The clients that may ask.

    Args:
        hashes: name of a client -> `hash_token` of its token. Empty: everybody may ask.
    """

    def __init__(self, hashes: Mapping[str, str]) -> None:
        self._hashes = {name: digest.encode() for name, digest in hashes.items()}

    def authenticate(self, authorization: str | None, address: str) -> str:
        """The name of the client that sent this `Authorization` header, or its address where no tokens are set.

        Raises:
            ApiError: 401, the token is missing or nobody's.
        """
        if not self._hashes:
            return address
        scheme, _, token = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise ApiError(401, "send a token: Authorization: Bearer ...", "missing_token")
        sent = hash_token(token.strip()).encode()
        # All of them, always: how long this takes must tell neither which one matched nor whether one did.
        matches = [name for name, digest in self._hashes.items() if hmac.compare_digest(sent, digest)]
        if not matches:
            raise ApiError(401, "this token is not known here", "invalid_token")
        return matches[0]


class RateLimit:
    """How many requests each client may send per minute: a bucket that holds a minute's worth and fills steadily."""

    def __init__(self, per_minute: int | None, now: Callable[[], float] = time.monotonic) -> None:
        self.per_minute = per_minute
        self._now = now
        self._buckets: dict[str, tuple[float, float]] = {}  # client -> (requests left, as of when)
        self._most_buckets = _MOST_BUCKETS

    def take(self, client: str) -> None:
        """Count a request.

        Raises:
            ApiError: 429, with the seconds after which the next one is allowed.
        """
        if self.per_minute is None:
            return
        now = self._now()
        left, then = self._buckets.get(client, (float(self.per_minute), now))
        left = min(self.per_minute, left + (now - then) * self.per_minute / 60)
        if left < 1:
            self._buckets[client] = (left, now)
            wait = math.ceil((1 - left) * 60 / self.per_minute)
            message = f"more than {self.per_minute} requests a minute; try again in {wait} s"
            raise ApiError(429, message, "rate_limited", retry_after_s=wait)
        self._buckets[client] = (left - 1, now)
        if len(self._buckets) > self._most_buckets:
            self._forget(now)
            # Where a minute brings more clients than that, not again at each request: all of them are looked at.
            self._most_buckets = max(_MOST_BUCKETS, 2 * len(self._buckets))

    def _forget(self, now: float) -> None:
        """Drop who has not asked for a minute: their buckets are full, as a new client's is."""
        self._buckets = {client: (left, then) for client, (left, then) in self._buckets.items() if now - then < 60}
