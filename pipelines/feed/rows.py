"""Several prepared folders read as one list of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipelines.shards.reader import ShardedDataset


class PreparedRows:
    """The rows of all folders, one folder after the other, numbered from 0. Threads may read at once. Picklable.

    Args:
        folders: Prepared folders, local or on an object store.
        cache_dir: Where shards of an object store are kept on this machine.
        cache_bytes: The room that they may take there, over all folders; 0 keeps none, and every row is a ranged GET.

    Attributes:
        sizes: Rows of each folder.
        num_tokens: int64[N], true length of each row, image and query tokens included.
        num_loss_tokens: int64[N], tokens that carry a label.
        has_image: bool[N].

    Raises:
        ValueError: No folder is given, or together they hold no row.
    """

    def __init__(self, folders: Sequence[str], cache_dir: str | None = None, cache_bytes: int = 64 * 2**30) -> None:
        self.datasets = [ShardedDataset(folder, cache_dir, cache_bytes) for folder in folders]
        for dataset in self.datasets:
            cache_bytes -= dataset.keep_within(cache_bytes)
        self.sizes = [len(dataset) for dataset in self.datasets]
        self._ends = np.cumsum(self.sizes)
        if not len(self):
            raise ValueError(f"nothing to train on: {list(folders)} hold no row")
        self.num_tokens = np.concatenate([dataset.num_tokens for dataset in self.datasets])
        self.num_loss_tokens = np.concatenate([dataset.num_loss_tokens for dataset in self.datasets])
        self.has_image = np.concatenate([dataset.has_image for dataset in self.datasets])

    def __len__(self) -> int:
        return sum(self.sizes)

    def read(self, row: int) -> dict[str, Any]:
        """Row number `row`, counted over all folders, as `ShardedDataset.read` gives it."""
        which = int(np.searchsorted(self._ends, row, side="right"))
        start = int(self._ends[which - 1]) if which else 0
        if which == len(self.datasets):
            raise IndexError(f"row {row} of {len(self)}")
        return self.datasets[which].read(row - start)
