"""How many workers a chain of Ray Data keeps for a step that holds a model."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from pipelines.settings import Section


class PoolSettings(Section):
    """A pool of workers, each with a model of its own."""

    min_workers: int = Field(default=1, gt=0)
    """Workers at the least."""
    max_workers: int | None = Field(default=None, gt=0)
    """Workers at the most, added while work is waiting; default: as many as the cluster's GPUs hold, or the least."""
    num_gpus: float = Field(default=1.0, gt=0, le=1)
    """Share of a GPU that one worker takes; not used on a cluster without GPUs, nor where a service answers."""

    def most(self, num_gpus: float) -> int:
        """The largest number of workers on a cluster of `num_gpus` GPUs."""
        return self.max_workers or max(self.min_workers, int(num_gpus / self.num_gpus))

    @model_validator(mode="after")
    def _least_below_most(self) -> Self:
        if self.max_workers is not None and self.max_workers < self.min_workers:
            raise ValueError(f"min_workers is {self.min_workers}, more than max_workers {self.max_workers}")
        return self
