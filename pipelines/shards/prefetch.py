"""Shards of an object store, on their way to this machine before they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from pipelines.shards.cache import ShardCache

AHEAD = 3
"""Shards that a process fetches while it reads another one: enough that the store is never idle."""


@dataclass(frozen=True)
class RemoteShard:
    """A shard that the cache may not hold yet."""

    sha256: str
    bytes: int
    fetch: Callable[[Path], None]
    """Writes it to a path; raises where it is not what was written."""


class Prefetcher:
    """A cache that is filled in the order in which shards are read, by threads. Threads may ask at once.

    Processes that share a cache fetch different shards at the same time, since each waits for what another one has
    begun. One that was forked needs a prefetcher of its own.
    """

    def __init__(self, cache: ShardCache) -> None:
        self.cache = cache
        self._lock = Lock()
        self._threads: ThreadPoolExecutor | None = None
        self._coming: dict[str, Future[Path]] = {}

    def get(self, shard: RemoteShard, following: Sequence[RemoteShard]) -> Path:
        """The file of `shard`; those of `following`, which are likely to be asked for next, set out as well.

        Raises: what the fetching of `shard` raises; those of `following` raise when they are asked for.
        """
        with self._lock:
            coming = self._coming.pop(shard.sha256, None)
            for later in following:
                self._set_out(later)
        if coming is not None:
            coming.result()
        return self.cache.get(shard.sha256, shard.bytes, shard.fetch)  # may have left the cache since it came

    def _set_out(self, shard: RemoteShard) -> None:
        if self.cache.has(shard.sha256):
            return
        if self._threads is None:
            self._threads = ThreadPoolExecutor(AHEAD, thread_name_prefix="shard-fetch")
        # What has come is kept for its error alone; never more under way than there are threads, so nobody waits in a
        # queue for the shard that he is to read now.
        under_way = sum(not each.done() for each in self._coming.values())
        if shard.sha256 not in self._coming and under_way < AHEAD:
            self._coming[shard.sha256] = self._threads.submit(self.cache.get, shard.sha256, shard.bytes, shard.fetch)
