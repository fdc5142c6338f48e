"""Steps whose gradients are not finite: survived a few times, then the run ends and names the samples."""

from __future__ import annotations

import numpy as np

from pipelines.feed import PreparedRows
from pipelines.training.ranks import Ranks

_NAMED = 32


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had gradients that are not finite; the message names the samples of the last one."""


class BadSteps:
    """Counts steps in a row that left the weights as they were, since the loss or its gradients were not finite.

    Args:
        limit: So many in a row end the run.
    """

    def __init__(self, limit: int) -> None:
        self.in_a_row = 0
        self._limit = limit

    def add(self, step: int, bad: bool, batch: np.ndarray, rows: PreparedRows, ranks: Ranks) -> None:
        """Count step number `step`, from 1, whose global batch was the rows int64[N] of `rows`. The same on all ranks.

        Raises:
            TrainingDiverged: It is one bad step too many.
        """
        if not bad:
            self.in_a_row = 0
            return
        self.in_a_row += 1
        # One rank reads: every one would fetch the same shards.
        named = ranks.share(_names(batch, rows) if ranks.rank == 0 else None)
        what = f"step {step}: the loss or its gradients are not finite"
        if self.in_a_row < self._limit:
            ranks.say(
                f"{what}, so the step changes nothing ({self.in_a_row} in a row, the run ends at {self._limit}); "
                f"its samples: {named}"
            )
            return
        raise TrainingDiverged(
            f"{what}, {self.in_a_row} steps in a row (run.max_bad_steps): lower optim.lr, or look at the samples of "
            f"this step: {named}. The last checkpoint is as it was"
        )


def _names(batch: np.ndarray, rows: PreparedRows) -> str:
    found = [rows.read(int(row)) for row in batch[:_NAMED]]
    more = f" and {len(batch) - _NAMED} more" if len(batch) > _NAMED else ""
    return ", ".join(f"{row['key']} (id {row['id']})" for row in found) + more
