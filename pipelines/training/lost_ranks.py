"""Says and records in a line which ranks of a run were lost, and where. Ray writes a page that does not name the rank.

When a process or a machine dies, the ranks that are left fail too, in their next exchange with it. So among what Ray
Train hands over, the ranks whose processes died are the cause, and those that raised an error of their own are not.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.callback import UserCallback

from pipelines.training.events import record

_LONGEST_REASON = 240


class TellLostRanks(UserCallback):
    """Runs in Ray Train's controller, tells the run's `Supervisor`, and adds it to the run's events."""

    def __init__(self, supervisor: Any, run_uri: str) -> None:
        self._supervisor = supervisor
        self._run_uri = run_uri

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """As `UserCallback.after_exception`."""
        places = ray.get(self._supervisor.places.remote())
        loss = describe_loss(worker_exceptions, places)
        ray.get(self._supervisor.tell.remote(loss))
        record(self._run_uri, "controller", "lost", message=loss)


def describe_loss(failures: Mapping[int, Exception], places: Mapping[int, str]) -> str:
    """What happened, in one line.

    Args:
        failures: Rank -> what it failed with. Not empty.
        places: Rank -> where it ran, as far as known.
    """
    lost = {rank: error for rank, error in failures.items() if _died(error)}
    named = lost or dict([min(failures.items())])
    ranks = ", ".join(f"rank {rank} on {places.get(rank, 'an unknown machine')}" for rank in sorted(named))
    others = f"; {len(failures) - len(named)} more stopped with it" if len(failures) > len(named) else ""
    reason = _reason(next(iter(named.values())))
    return f"{'lost' if lost else 'failed:'} {ranks} ({reason}){others}"


def _died(error: Exception) -> bool:
    return isinstance(error, WorkerHealthCheckFailedError | RayActorError)


def _reason(error: Exception) -> str:
    """The last line of Ray's page, where the cause stands; the first of anybody else's."""
    cause = getattr(error, "health_check_failure", error)
    lines = str(cause).strip().splitlines() or [""]
    reason = lines[-1] if _died(error) else f"{type(error).__name__}: {lines[0]}"
    return textwrap.shorten(reason, _LONGEST_REASON, placeholder=" ...")
