"""Row lengths + seed + epoch -> the global batches of the epoch. Arithmetic on row numbers; nothing is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Position:
    """Where the feed stands: the next global batch is number `batch` of epoch `epoch`."""

    epoch: int = 0
    batch: int = 0
    samples_seen: int = 0


@dataclass(frozen=True)
class GlobalBatch:
    """The rows of one optimizer step, over all ranks."""

    rows: np.ndarray
    """int64[<= global_batch], longest row first."""
    num_tokens: int
    num_loss_tokens: int
    after: Position
    """Where the feed stands once this batch has been trained on."""


class Mixture:
    """How often an epoch takes the rows of several sources.

    A source is an endless series of shuffles of itself, of which every epoch takes the next `weight`. So with 1 an
    epoch holds each row once, with 2 twice; with 0.25 a quarter of them, and none again before all others have come.

    Args:
        sizes: Rows of each source.
        weights: Epochs of each source in an epoch of the run, above 0.

    Attributes:
        taken: Rows that an epoch takes of each source.

    Raises:
        ValueError: There is not one weight for each source, or a weight is not above 0.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float]) -> None:
        if len(weights) != len(sizes):
            raise ValueError(f"{len(weights)} weights are given for {len(sizes)} sources; each needs one")
        if wrong := [weight for weight in weights if not weight > 0]:
            raise ValueError(f"a weight is {wrong[0]}; it must be above 0 (leave out a source that is not wanted)")
        self._sizes = list(sizes)
        self.taken = [max(1, round(size * weight)) if size else 0 for size, weight in zip(sizes, weights, strict=True)]

    def rows(self, epoch: int, seed: int) -> np.ndarray:
        """The row numbers that an epoch takes, in rising order: int64[sum(taken)]."""
        chosen = []
        start = 0
        for source, (size, count) in enumerate(zip(self._sizes, self.taken, strict=True)):
            chosen.append(start + self._next(source, size, epoch * count, (epoch + 1) * count, seed))
            start += size
        return np.sort(np.concatenate(chosen))

    def _next(self, source: int, size: int, start: int, stop: int, seed: int) -> np.ndarray:
        passes = range(start // size, -(-stop // size)) if size else range(0)
        # Never the draw of an epoch, which has two numbers (of which missing ones count as 0).
        shuffles = [shuffled(np.arange(size), _bits(seed, number, source + 1)) for number in passes]
        if not shuffles:
            return np.zeros(0, dtype=np.int64)
        return np.concatenate(shuffles)[start - passes[0] * size : stop - passes[0] * size]


class Feed:
    """The global batches of every epoch, from row lengths and a seed.

    Each row appears exactly once per epoch, or as often as `mixture` says. A batch holds rows with an image or rows
    without; what is left over of both (less than one batch each) comes at the end of the epoch, where a batch may mix
    them and the last may be short.

    Args:
        num_tokens: int[N], true length of each row, image and query tokens included.
        num_loss_tokens: int[N], tokens that carry a label.
        has_image: bool[N].
        global_batch: Rows per optimizer step.
        seed: Changes the order, and nothing else does.
        length_group: Global batches that are sorted by length together. More saves padding; 1 leaves the rows of a
            batch a random draw.
        mixture: How often an epoch takes the rows of each source; by default each row once.
    """

    def __init__(
        self,
        num_tokens: np.ndarray,
        num_loss_tokens: np.ndarray,
        has_image: np.ndarray,
        global_batch: int,
        seed: int,
        length_group: int = 8,
        mixture: Mixture | None = None,
    ) -> None:
        self.num_tokens = np.asarray(num_tokens, dtype=np.int64)
        self.num_loss_tokens = np.asarray(num_loss_tokens, dtype=np.int64)
        self.has_image = np.asarray(has_image, dtype=bool)
        self.global_batch = global_batch
        self.seed = seed
        self.length_group = length_group
        self._mixture = mixture

    @property
    def rows_per_epoch(self) -> int:
        """Samples that an epoch trains on."""
        return sum(self._mixture.taken) if self._mixture else len(self.num_tokens)

    @property
    def batches_per_epoch(self) -> int:
        """Optimizer steps per epoch, a short last one included."""
        return -(-self.rows_per_epoch // self.global_batch)

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The row numbers of each global batch of an epoch: int64[global_batch], the last one perhaps shorter."""
        draw = _bits(self.seed, epoch)
        taken = self._mixture.rows(epoch, self.seed) if self._mixture else np.arange(len(self.num_tokens))
        order = shuffled(taken, draw)
        batches: list[np.ndarray] = []
        rest: list[np.ndarray] = []
        for modality in (order[self.has_image[order]], order[~self.has_image[order]]):
            whole = len(modality) - len(modality) % self.global_batch
            rest.append(modality[whole:])
            span = self.global_batch * self.length_group
            for start in range(0, whole, span):
                group = self._longest_first(modality[start : min(start + span, whole)])
                batches.extend(np.split(group, len(group) // self.global_batch))
        batches = [batches[i] for i in shuffled(np.arange(len(batches)), draw)]
        left = np.concatenate(rest)
        batches.extend(
            self._longest_first(left[i : i + self.global_batch]) for i in range(0, len(left), self.global_batch)
        )
        return batches

    def walk(self, position: Position, num_batches: int) -> Iterator[GlobalBatch]:
        """The next `num_batches` global batches from `position` on, over the ends of epochs."""
        epoch, batch, seen = position.epoch, position.batch, position.samples_seen
        batches = self.epoch(epoch)
        for _ in range(num_batches):
            if batch == len(batches):
                epoch, batch = epoch + 1, 0
                batches = self.epoch(epoch)
            rows = batches[batch]
            batch, seen = batch + 1, seen + len(rows)
            yield GlobalBatch(
                rows=rows,
                num_tokens=int(self.num_tokens[rows].sum()),
                num_loss_tokens=int(self.num_loss_tokens[rows].sum()),
                after=Position(epoch, batch, seen),
            )

    def _longest_first(self, rows: np.ndarray) -> np.ndarray:
        return rows[np.argsort(-self.num_tokens[rows], kind="stable")]


def _bits(*numbers: int) -> np.random.PCG64:
    return np.random.PCG64(np.random.SeedSequence(list(numbers)))


def shuffled(items: np.ndarray, draw: np.random.PCG64) -> np.ndarray:
    """`items` in an order that `draw` decides."""
    # Raw output of a bit generator is the part of numpy's random module that never changes between releases;
    # `Generator.permutation` may, and a run resumed after an upgrade would then see other batches.
    return items[np.argsort(draw.random_raw(len(items)), kind="stable")]
