"""A call that many wait for and that is made once."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any


class SingleFlight:
    """Whoever asks while the call runs, or shortly after it, hears how that one ends; who leaves does not end it.

    Args:
        call: what is to be done. An exception is an outcome as well.
        holds_s: how long after its end an outcome is still told.
    """

    def __init__(self, call: Callable[[], Coroutine[Any, Any, None]], holds_s: float = 0.0) -> None:
        self._call = call
        self._holds_s = holds_s
        self._task: asyncio.Task[None] | None = None
        self._ended_at = 0.0

    async def __call__(self) -> None:
        """Raise as the call does."""
        if self._task is None or self._is_over(self._task):
            self._task = asyncio.create_task(self._call())
            self._task.add_done_callback(self._end)
        await asyncio.shield(self._task)

    def _is_over(self, task: asyncio.Task[None]) -> bool:
        return task.done() and (task.cancelled() or time.monotonic() >= self._ended_at + self._holds_s)

    def _end(self, task: asyncio.Task[None]) -> None:
        self._ended_at = time.monotonic()
        if not task.cancelled():
            task.exception()  # asyncio would complain of one that nobody was left to hear of
