"""The actor between the driver of a run and its workers.

It and Ray Train's controller are processes that compute nothing, so this module imports neither torch nor the model.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any, Literal

import ray
from pydantic import BaseModel
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

_BEAT_S = 2.0
_SAVE_S = 0.5
"""How long a question after the next checkpoint waits for it."""


class Outcome(BaseModel):
    """How the workers ended, where restarting them is no use."""

    kind: Literal["stopped", "failed"]
    message: str


class Supervisor:
    """An actor beside the driver: takes its word to the workers, and theirs to it."""

    def __init__(self) -> None:
        self._stop = asyncio.Event()
        self._outcome: Outcome | None = None
        self._last_beat = time.monotonic()
        self._saves = 0
        self._saved = asyncio.Condition()
        self._places: dict[int, str] = {}
        self._news: list[str] = []
        self._told: set[str] = set()

    async def settle(self, rank: int, place: str) -> None:
        """A rank says where it runs."""
        self._places[rank] = place

    async def places(self) -> dict[int, str]:
        """Rank -> where it runs, or last ran."""
        return self._places

    async def tell(self, line: str) -> None:
        """Something that whoever watches the run should read, once."""
        if line not in self._told:
            self._told.add(line)
            self._news.append(line)

    async def news(self) -> list[str]:
        """What has been told since the last call."""
        news, self._news = self._news, []
        return news

    async def stop(self) -> None:
        """Ask the workers to save and end."""
        self._stop.set()

    async def stop_asked(self) -> bool:
        """Whether they have been asked to; waits a moment for it. Counts as a sign of life."""
        self._last_beat = time.monotonic()
        try:
            await asyncio.wait_for(self._stop.wait(), _BEAT_S)
        except TimeoutError:
            return False
        return True

    async def quiet_for(self) -> float:
        """Seconds since a worker last gave a sign of life, or since the start."""
        return time.monotonic() - self._last_beat

    async def saved(self) -> None:
        """A checkpoint is complete."""
        async with self._saved:
            self._saves += 1
            self._saved.notify_all()

    async def saves_after(self, count: int) -> int:
        """How many checkpoints there have been; waits a moment for one after the `count`-th."""
        async with self._saved:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._saved.wait_for(lambda: self._saves != count), _SAVE_S)
        return self._saves

    async def end(self, outcome: dict[str, Any]) -> None:
        """Keep how the workers ended."""
        self._outcome = Outcome.model_validate(outcome)

    async def outcome(self) -> dict[str, Any] | None:
        """How the workers ended."""
        return self._outcome.model_dump() if self._outcome else None


def start_supervisor() -> Any:
    """The handle of a `Supervisor` beside this process."""
    # As Ray Train's controller: an actor without CPUs may land on any machine, and that one be lost.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    start: Any = ray.remote(num_cpus=0)(Supervisor)
    return start.options(scheduling_strategy=here).remote()
