"""How a job ends: with a status that scripts read, and one line that people read."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator

from botocore.exceptions import BotoCoreError

INTERRUPTED = 130
"""What shells report of a command that Ctrl-C has ended."""
_BY_RAY = int(signal.SIGTERM)
"""The status of the exit by which Ray answers SIGTERM, in a process that has joined it."""


def exit_status(work: Callable[[], int], stopped: str = "run the same command again to go on from here") -> int:
    """Do a job's work. Returns its status, 1 after an error and 130 after Ctrl-C; both are said in a line on stderr.

    SIGTERM, by which batch systems and `ray job stop` end a job, counts as Ctrl-C.

    Args:
        work: returns the status. What it raises beyond ValueError, OSError and BotoCoreError is a bug, and passes.
        stopped: what Ctrl-C leaves to be done.
    """
    try:
        with terminate_as_interrupt():
            return work()
    except KeyboardInterrupt:
        print(f"\nstopped; {stopped}", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, BotoCoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


@contextlib.contextmanager
def terminate_as_interrupt() -> Iterator[None]:
    """Within the block, SIGTERM (what a batch system sends) stops this process as Ctrl-C does.

    Ray sets a handler of its own when it is joined: its SystemExit leaves the block as KeyboardInterrupt too.
    """
    if threading.current_thread() is not threading.main_thread():  # another one has no say over signals
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    except SystemExit as end:
        if end.code == _BY_RAY:
            raise KeyboardInterrupt from end
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
