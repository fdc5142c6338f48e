"""The driver's eyes while Ray Train runs: SIGTERM, workers that are lost, and workers that never come."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import ray

from pipelines import storage

_LOOK_EVERY_S = 0.5
_RECORD_NAME = "checkpoint_manager_snapshot.json"
_SIGNS_OF_LIFE_S = 30.0
"""Workers that gave a sign of life this lately can be asked to stop."""


class Lookout:
    """Looks after a run from a thread of the driver; use as a context manager, in the main thread for SIGTERM.

    Args:
        supervisor: The handle of the run's `Supervisor`.
        start_timeout_s: Seconds without any worker after which the run is abandoned.
        abandon: Ends the run from outside.

    Attributes:
        stopped: SIGTERM has come.
        too_quiet: The run was abandoned for want of workers.
    """

    def __init__(self, supervisor: Any, start_timeout_s: float, abandon: Callable[[], None]) -> None:
        self.stopped = self.too_quiet = False
        self._supervisor = supervisor
        self._start_timeout_s = start_timeout_s
        self._abandon = abandon
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look, name="lookout", daemon=True)
        self._handler_before: Any = None

    def __enter__(self) -> Lookout:
        if threading.current_thread() is threading.main_thread():
            self._handler_before = signal.signal(signal.SIGTERM, self._on_sigterm)
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._done.set()
        self._thread.join()
        self._pass_on_news()
        if self._handler_before is not None:
            signal.signal(signal.SIGTERM, self._handler_before)

    def _on_sigterm(self, number: int, frame: FrameType | None) -> None:
        self.stopped = True  # the thread does the rest: a handler may interrupt Ray anywhere

    def _look(self) -> None:
        asked = False
        while not self._done.wait(_LOOK_EVERY_S):
            quiet: Any = ray.get(self._supervisor.quiet_for.remote())
            self._pass_on_news()
            if self.stopped and not asked:
                asked = True
                print("SIGTERM: the workers save a checkpoint and end", flush=True)
                ray.get(self._supervisor.stop.remote())
            self.too_quiet = quiet > self._start_timeout_s
            if self.too_quiet or (self.stopped and quiet > _SIGNS_OF_LIFE_S):
                self._abandon()
                return

    def _pass_on_news(self) -> None:
        news: Any = ray.get(self._supervisor.news.remote())
        for line in news:
            print(line, flush=True)


def drop_record(run_uri: str) -> None:
    """Remove Ray Train's record of a run's checkpoints, which it refuses to start with where one of them is gone.

    Nothing is lost: the checkpoints themselves say which are complete, and a run goes on from the newest that verifies.
    """
    uri = storage.join(run_uri, _RECORD_NAME)
    if storage.exists(uri):
        file_system, path = storage.filesystem(uri)
        file_system.rm(path)
