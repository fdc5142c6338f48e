"""A thread for what training must not wait for: a log's upload, a tracker's server."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

_MOST_WAITING = 1000
_CLOSE_PATIENCE_S = 60.0


class Errands:
    """Does calls in a thread, in order. One that fails is left out and counted, and the first such is said aloud.

    So is one that finds too many before it, and what is left when patience ends: no server stops a run.

    Args:
        what: What the calls do, for the message: "W&B has not taken ...".
    """

    def __init__(self, what: str) -> None:
        self.failed = 0
        """Calls that failed or were dropped."""
        self._what = what
        self._calls: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._busy = self._closed = False
        self._thread: threading.Thread | None = None

    @property
    def waiting(self) -> int:
        """Calls that have not begun."""
        return len(self._calls)

    def add(self, call: Callable[[], None]) -> None:
        """Have `call` done soon; returns at once."""
        with self._changed:
            if len(self._calls) >= _MOST_WAITING:
                self._fail(f"{_MOST_WAITING} others wait before it")
                return
            self._calls.append(call)
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name=self._what, daemon=True)
                self._thread.start()

    def close(self, patience_s: float = _CLOSE_PATIENCE_S) -> None:
        """Wait until all is done, for so long at most; say how much was not."""
        deadline = time.monotonic() + patience_s
        with self._changed:
            while (self._calls or self._busy) and (left := deadline - time.monotonic()) > 0:
                self._changed.wait(left)
            undone = len(self._calls) + self._busy
            self._calls.clear()
            self._closed = True
            self._changed.notify_all()
        if undone:
            self._fail(f"no end after {patience_s:g} s", undone)
        if self.failed > 1:
            print(f"warning: {self._what} failed {self.failed} times in all", flush=True)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._calls:
                    if self._closed:
                        return
                    self._changed.wait()
                call = self._calls.popleft()
                self._busy = True
            try:
                call()
            # Whatever a tracker's library or a store may raise: the run is worth more than its log.
            except Exception as error:
                self._fail(f"{type(error).__name__}: {error}")
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _fail(self, why: str, times: int = 1) -> None:
        self.failed += times
        if self.failed == times:
            print(f"warning: {self._what} failed ({why}); training goes on, later failures are counted", flush=True)
