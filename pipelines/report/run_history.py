"""Events of a run -> its attempts, and why each ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.report.run_contents import Attempt, History

_KILLED = "the job ended without a word: it was killed, or its machine was lost"


def history_of(events: Sequence[Mapping[str, Any]], last_logged: float | None = None) -> History:
    """What happened, from events in order of time.

    Args:
        events: As `pipelines.training.events.read_events` gives them.
        last_logged: When the last metrics were written, seconds since 1970.
    """
    teller = _Teller()
    for event in events:
        teller.take(event)
    return teller.history(last_logged)


class _Teller:
    def __init__(self) -> None:
        self._attempts: list[Attempt] = []
        self._state, self._message = "unknown", ""
        self._job_started: float | None = None
        self._seconds = 0.0
        self._seen: float | None = None
        self._saved: list[int] = []
        self._notes: list[tuple[float, str, str]] = []

    def take(self, event: Mapping[str, Any]) -> None:
        takers = {
            "started": self._take_start,
            "attempt": self._take_attempt,
            "hung": self._take_hang,
            "lost": self._take_loss,
            "saved": self._take_save,
            "ended": self._take_end,
        }
        if event["kind"] in takers:
            takers[event["kind"]](event)
        self._seen = event["time"]
        self._notes.append((event["time"], event["who"], _told(event)))

    def history(self, last_logged: float | None) -> History:
        last = max((time for time in (self._seen, last_logged) if time is not None), default=None)
        seconds = self._seconds
        if self._job_started is not None and last is not None:
            seconds += last - self._job_started
        return History(self._attempts, self._state, self._message, seconds, last, sorted(set(self._saved)), self._notes)

    def _take_start(self, event: Mapping[str, Any]) -> None:
        if self._job_started is not None and self._seen is not None:  # the job before left no end
            self._seconds += self._seen - self._job_started
            self._close(self._seen, _KILLED, is_failure=True)
        self._job_started = event["time"]
        self._state, self._message = "running", ""

    def _take_attempt(self, event: Mapping[str, Any]) -> None:
        world_size = event["world_size"]
        before = self._open()
        if before:
            resized = before.world_size != world_size
            how = f"the number of workers changed from {before.world_size} to {world_size}"
            self._close(event["time"], how if resized else "the workers were started anew", is_failure=False)
        self._attempts.append(
            Attempt(
                started=event["time"],
                step=event["step"],
                reached=event["reached"],
                num_steps=event["num_steps"],
                world_size=world_size,
                machines=[(name, device) for name, device in event["machines"]],
                peak=event["peak"],
                data=event["data"],
                environment=event["environment"],
            )
        )

    def _take_hang(self, event: Mapping[str, Any]) -> None:
        self._close(event["time"], event["message"], is_failure=True)

    def _take_loss(self, event: Mapping[str, Any]) -> None:
        self._close(event["time"], event["message"], is_failure=True)

    def _take_save(self, event: Mapping[str, Any]) -> None:
        self._saved.append(event["step"])

    def _take_end(self, event: Mapping[str, Any]) -> None:
        self._state, self._message = event["outcome"], event["message"]
        if self._job_started is not None:
            self._seconds += event["time"] - self._job_started
        self._job_started = None
        said = f": {event['message']}" if event["message"] else ""
        self._close(event["time"], f"{event['outcome']}{said}", is_failure=event["outcome"] == "failed")

    def _open(self) -> Attempt | None:
        return self._attempts[-1] if self._attempts and self._attempts[-1].ended is None else None

    def _close(self, time: float, why: str, is_failure: bool) -> None:
        attempt = self._open()
        if attempt:
            attempt.ended, attempt.why, attempt.is_failure = time, why, is_failure


def _told(event: Mapping[str, Any]) -> str:
    kind = event["kind"]
    if kind == "started":
        return f"the job started on {event['host']}"
    if kind == "attempt":
        return f"{event['world_size']} workers began at step {event['step']:,} of {event['num_steps']:,}"
    if kind == "saved":
        return f"checkpoint {event['name']} is complete"
    if kind == "ended":
        return f"the job {event['outcome']}" + (f": {event['message']}" if event["message"] else "")
    return str(event.get("message", kind))
