"""What happened to a run: every start, save, fallback, failure and end, for its report.

Each process that has something to tell writes a file of its own below `events/` in the run's folder, whole each time:
an object store cannot append, and several processes of several attempts must not overwrite each other.
"""

from __future__ import annotations

import json
import time
import uuid
from datetime import UTC, datetime
from typing import Any

from pipelines import storage
from pipelines.training.errands import Errands

FOLDER_NAME = "events"
_RECORD_PATIENCE_S = 10.0


class EventLog:
    """The events of one process.

    Args:
        run_uri: The run's folder.
        who: A word for this process: driver, worker.
    """

    def __init__(self, run_uri: str, who: str) -> None:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        self._uri = storage.join(run_uri, FOLDER_NAME, f"{stamp}-{who}-{uuid.uuid4().hex[:8]}.jsonl")
        self._who = who
        self._text = ""
        self._errands = Errands(f"writing {self._uri}")

    def write(self, kind: str, **facts: Any) -> None:
        """Add an event, without waiting for the store. A failed write is made good by the next one."""
        self._text += json.dumps({"time": time.time(), "kind": kind, "who": self._who, **facts}) + "\n"
        data = self._text.encode()
        self._errands.add(lambda: storage.write_bytes(self._uri, data))

    def note(self, message: str) -> None:
        """Add what was said to the person who watches."""
        self.write("note", message=message)

    def close(self, patience_s: float = 60.0) -> None:
        """Wait until all events are written."""
        self._errands.close(patience_s)


def record(run_uri: str, who: str, kind: str, **facts: Any) -> None:
    """Write a single event, and wait for it a moment: this process may end at once."""
    log = EventLog(run_uri, who)
    log.write(kind, **facts)
    log.close(_RECORD_PATIENCE_S)


def read_events(run_uri: str) -> list[dict[str, Any]]:
    """All events of a run in order of time, each with `time` (seconds since 1970), `kind` and `who`."""
    folder = storage.join(run_uri, FOLDER_NAME)
    names = [name for name in storage.list_names(folder) if name.endswith(".jsonl")]
    files = storage.read_many([storage.join(folder, name) for name in names])
    events = [json.loads(line) for data in files for line in data.decode().splitlines()]
    return sorted(events, key=lambda event: event["time"])
