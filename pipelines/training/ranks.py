"""What the ranks of a run tell each other beside the gradients: small objects, flags, barriers."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """All ranks of a run, over a process group of their own. Every method is collective: call it on every rank.

    The group is gloo's even where gradients go over NCCL: a flag must not wait for the GPU's queue, and a thread that
    uploads a checkpoint may talk over its own `Ranks` while the training goes on.

    Args:
        timeout_s: How long one rank waits for the others before it raises.
        note: Also given what `say` prints.
    """

    def __init__(self, timeout_s: float, note: Callable[[str], None] | None = None) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        # Set by Ray Train, and by torchrun.
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        self.local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self._note = note

    def gather(self, item: Any) -> list[Any]:
        """Every rank's `item`, in order of ranks."""
        items: list[Any] = [None] * self.world_size
        dist.all_gather_object(items, item, group=self._group)
        return items

    def share(self, item: Any) -> Any:
        """Rank 0's `item`."""
        items = [item]
        dist.broadcast_object_list(items, src=0, group=self._group)
        return items[0]

    def largest(self, values: list[int]) -> list[int]:
        """The largest of all ranks' `values`, place by place."""
        if self.world_size == 1:
            return [int(value) for value in values]
        both = torch.tensor(values, dtype=torch.int64)
        dist.all_reduce(both, dist.ReduceOp.MAX, group=self._group)
        return both.tolist()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        dist.barrier(group=self._group)

    def say(self, message: str) -> None:
        """Print `message` once, from rank 0. Not collective."""
        if self.rank == 0:
            print(message, flush=True)
            if self._note:
                self._note(message)
