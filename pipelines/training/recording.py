"""The driver's share of a run's record: when the job began, how it ended, and the report."""

from __future__ import annotations

import os
import socket
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from pipelines.report.run_page import write_run_report
from pipelines.training.events import EventLog

_REFRESH_S = 300.0
_SHOWN = 600
"""Characters of an error that the record keeps."""


@contextmanager
def recorded(run_uri: str, stopped: tuple[type[BaseException], ...]) -> Iterator[None]:
    """Record the job inside: its start, its end, and the report, which is also written anew every few minutes.

    Args:
        run_uri: The run's folder.
        stopped: Exceptions that mean an early end, not a failure.
    """
    events = EventLog(run_uri, "driver")
    events.write("started", host=socket.gethostname(), process=os.getpid())
    done = threading.Event()
    refreshing = threading.Thread(target=_refresh, args=(run_uri, done), name="report", daemon=True)
    refreshing.start()
    outcome, message = "finished", ""
    try:
        yield
    except BaseException as error:
        outcome = "stopped" if isinstance(error, stopped) else "failed"
        message = shortened(error)
        raise
    finally:
        done.set()
        events.write("ended", outcome=outcome, message=message)
        events.close()
        refreshing.join()
        if uri := _write(run_uri):
            print(f"the report of the run is {uri}", flush=True)


def shortened(error: BaseException) -> str:
    """The first and the last line of an error: what lies between is mostly a trace."""
    lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"
    return text[:_SHOWN]


def _refresh(run_uri: str, done: threading.Event) -> None:
    while not done.wait(_REFRESH_S):
        _write(run_uri)


def _write(run_uri: str) -> str | None:
    try:
        return write_run_report(run_uri)
    # A run that is done must not fail on its report, whatever is wrong with that.
    except Exception as error:
        traceback.print_exc()
        print(f"warning: the report of {run_uri} could not be written ({error}); the run is not affected", flush=True)
        return None
