"""How a job ends: with a status that scripts read, and one line that people read."""

from __future__ import annotations

import sys
from collections.abc import Callable

from botocore.exceptions import BotoCoreError

INTERRUPTED = 130
"""What shells report of a command that Ctrl-C has ended."""


def exit_status(work: Callable[[], int], stopped: str = "run the same command again to go on from here") -> int:
    """Do a job's work. Returns its status, 1 after an error and 130 after Ctrl-C; both are said in a line on stderr.

    Args:
        work: returns the status. What it raises beyond ValueError, OSError and BotoCoreError is a bug, and passes.
        stopped: what Ctrl-C leaves to be done.
    """
    try:
        return work()
    except KeyboardInterrupt:
        print(f"\nstopped; {stopped}", file=sys.stderr)
        return INTERRUPTED
    except (ValueError, OSError, BotoCoreError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
