"""Manifests + seed + position -> this rank's micro-batches, the same global batches for any number of workers.

1. `PreparedRows` (rows.py) puts one or more prepared folders one after the other: row i, its lengths, its image.
2. `Feed` (batches.py) draws the global batches of an epoch: one modality and similar true lengths in each (the grouping
   of LLaVA-1.5, which the published recipe uses; here an image counts the tokens it really takes).
3. `deal` (sharing.py) deals a global batch out to micro-steps and ranks: so many rows each, or so many tokens, or
   several samples in one line. It is the only place that knows the world size.
4. `BatchLoader` (loader.py) reads one rank's rows in threads, ahead of the step, and measures how long the step waits.

Everything before 4 is arithmetic on row numbers, so batch k of epoch e holds the same rows whatever the world size,
the micro-batch or the number of restarts: a `Position` of three numbers resumes exactly.
"""

from typing import TYPE_CHECKING, Any

from pipelines.feed.batches import Feed, GlobalBatch, Mixture, Position
from pipelines.feed.rows import PreparedRows
from pipelines.feed.sharing import BudgetError, TokenBudget, deal

if TYPE_CHECKING:
    from pipelines.feed.loader import BatchLoader, MicroBatch, model_inputs

__all__ = [
    "BatchLoader",
    "BudgetError",
    "Feed",
    "GlobalBatch",
    "MicroBatch",
    "Mixture",
    "Position",
    "PreparedRows",
    "TokenBudget",
    "deal",
    "model_inputs",
]


def __getattr__(name: str) -> Any:
    """The loader, when it is first asked for: it needs torch and the model, settings and arithmetic do not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from pipelines.feed import loader

    return getattr(loader, name)
