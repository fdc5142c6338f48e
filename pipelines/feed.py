"""Manifest + seed + position -> global batches, the same for any number of workers.

1. `PreparedRows` puts one or more prepared folders one after the other: row i, its lengths, whether it has an image.
2. `Feed` shuffles the row numbers of an epoch into global batches: one modality and similar true lengths in each
   (the grouping of LLaVA-1.5, which the published recipe uses; here an image counts the tokens it really takes).
3. `split` deals a global batch out to micro-steps and ranks. It is the only place that knows the world size.
4. `BatchLoader` reads one rank's rows in threads, ahead of the step, and measures how long the step waits.

Everything before 4 is arithmetic on row numbers, so batch k of epoch e holds the same rows whatever the world size,
the micro-batch or the number of restarts: a `Position` of three numbers resumes exactly.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch

from flashsloth import FlashSlothProcessor
from flashsloth.collation import IGNORED_LABEL, collate
from flashsloth.image_processing_flashsloth import WITH_GIF, decode_image
from pipelines.shards.reader import ShardedDataset


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


class PreparedRows:
    """Several prepared folders read as one list of rows. Picklable.

    Raises:
        ValueError: No folder is given, or together they hold no row.
    """

    def __init__(self, folders: Sequence[str], cache_dir: str | None = None) -> None:
        self.datasets = [ShardedDataset(folder, cache_dir=cache_dir) for folder in folders]
        self._ends = np.cumsum([len(dataset) for dataset in self.datasets])
        if not len(self):
            raise ValueError(f"nothing to train on: {list(folders)} hold no row")
        self.num_tokens = np.concatenate([dataset.num_tokens for dataset in self.datasets])
        self.num_loss_tokens = np.concatenate([dataset.num_loss_tokens for dataset in self.datasets])
        self.has_image = np.concatenate([dataset.has_image for dataset in self.datasets])

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def read(self, row: int) -> dict[str, Any]:
        """Row number `row`, counted over all folders, as `ShardedDataset.read` gives it."""
        which = int(np.searchsorted(self._ends, row, side="right"))
        start = int(self._ends[which - 1]) if which else 0
        return self.datasets[which].read(row - start)


class Feed:
    """The global batches of every epoch, from row lengths and a seed.

    Each row appears exactly once per epoch. A batch holds rows with an image or rows without; what is left over of both
    (less than one batch each) comes at the end of the epoch, where a batch may mix them and the last may be short.

    Args:
        num_tokens: int[N], true length of each row, image and query tokens included.
        num_loss_tokens: int[N], tokens that carry a label.
        has_image: bool[N].
        global_batch: Rows per optimizer step.
        seed: Changes the order, and nothing else does.
        length_group: Global batches that are sorted by length together. More saves padding; 1 leaves the rows of a
            batch a random draw.
    """

    def __init__(
        self,
        num_tokens: np.ndarray,
        num_loss_tokens: np.ndarray,
        has_image: np.ndarray,
        global_batch: int,
        seed: int,
        length_group: int = 8,
    ) -> None:
        self.num_tokens = np.asarray(num_tokens, dtype=np.int64)
        self.num_loss_tokens = np.asarray(num_loss_tokens, dtype=np.int64)
        self.has_image = np.asarray(has_image, dtype=bool)
        self.global_batch = global_batch
        self.seed = seed
        self.length_group = length_group

    @property
    def batches_per_epoch(self) -> int:
        """Optimizer steps per epoch, a short last one included."""
        return -(-len(self.num_tokens) // self.global_batch)

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The row numbers of each global batch of an epoch: int64[global_batch], the last one perhaps shorter."""
        draw = np.random.PCG64(np.random.SeedSequence([self.seed, epoch]))
        order = _shuffled(np.arange(len(self.num_tokens)), draw)
        batches: list[np.ndarray] = []
        rest: list[np.ndarray] = []
        for modality in (order[self.has_image[order]], order[~self.has_image[order]]):
            whole = len(modality) - len(modality) % self.global_batch
            rest.append(modality[whole:])
            span = self.global_batch * self.length_group
            for start in range(0, whole, span):
                group = self._longest_first(modality[start : min(start + span, whole)])
                batches.extend(np.split(group, len(group) // self.global_batch))
        batches = [batches[i] for i in _shuffled(np.arange(len(batches)), draw)]
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


def split(rows: np.ndarray, world_size: int, micro_batch: int) -> list[list[np.ndarray]]:
    """Deal a global batch out: `[micro-step][rank] -> rows`, at most `micro_batch` each, neighbours of similar length.

    Every rank gets the same number of micro-steps, as it must: ranks meet in each forward and backward. In a short
    batch the shares are evened out, and where there are fewer rows than ranks some shares are empty.
    """
    num_steps = -(-len(rows) // (world_size * micro_batch))
    shares = np.array_split(rows, num_steps * world_size)
    return [shares[step * world_size : (step + 1) * world_size] for step in range(num_steps)]


def _shuffled(items: np.ndarray, draw: np.random.PCG64) -> np.ndarray:
    # Raw output of a bit generator is the part of numpy's random module that never changes between releases;
    # `Generator.permutation` may, and a run resumed after an upgrade would then see other batches.
    return items[np.argsort(draw.random_raw(len(items)), kind="stable")]


@dataclass(frozen=True)
class MicroBatch:
    """What one rank does in one micro-step."""

    batch: GlobalBatch
    is_last: bool
    """True for the micro-step that completes the global batch."""
    inputs: dict[str, torch.Tensor]
    """`input_ids, attention_mask, labels, question_ids` int64[B, S] and `pixel_values` uint8[N, T, 3, H, W] or
    `patch_features` float16[N, T, P, D]; N is 0 where no row has an image."""


class BatchLoader:
    """One rank's micro-batches, read ahead of the step by threads. Iterate once; use as a context manager.

    Args:
        rows: Where the rows come from.
        batches: The global batches, in order.
        rank: This rank.
        world_size: Number of ranks.
        micro_batch: Rows per rank and micro-step.
        processor: Decodes the images of payload `original` and names the padding token.
        threads: Readers; several hide the latency of an object store and the cost of decoding.
        prefetch: Micro-batches kept ready.
    """

    def __init__(
        self,
        rows: PreparedRows,
        batches: Iterator[GlobalBatch],
        *,
        rank: int,
        world_size: int,
        micro_batch: int,
        processor: FlashSlothProcessor,
        threads: int = 1,
        prefetch: int = 4,
    ) -> None:
        self.waited_s = 0.0
        self._rows = rows
        self._shares = _shares(batches, rank, world_size, micro_batch)
        self._processor = processor
        self._no_image = _no_image(rows, processor)
        self._prefetch = prefetch
        self._reading = threading.Lock()  # a ShardedDataset serves one thread at a time; decoding runs beside it
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="feed")

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[MicroBatch]:
        pending: deque[tuple[GlobalBatch, bool, Future[dict[str, torch.Tensor]]]] = deque()
        while True:
            while len(pending) < self._prefetch and (share := next(self._shares, None)):
                batch, is_last, numbers = share
                pending.append((batch, is_last, self._pool.submit(self._load, batch, numbers)))
            if not pending:
                return
            batch, is_last, future = pending.popleft()
            started = time.perf_counter()
            inputs = future.result()
            self.waited_s += time.perf_counter() - started
            yield MicroBatch(batch, is_last, inputs)

    def _load(self, batch: GlobalBatch, numbers: np.ndarray) -> dict[str, torch.Tensor]:
        if len(numbers):
            samples = [self._sample(int(number)) for number in numbers]
        else:
            # A rank without a row still runs the model, as its peers wait for it: on the batch's shortest row, with
            # no label, so that neither loss nor gradients notice.
            sample = self._sample(int(batch.rows[-1]))
            samples = [{**sample, "labels": np.full_like(sample["labels"], IGNORED_LABEL)}]
        inputs = collate(samples, pad_token_id=self._processor.pad_token_id)
        if not inputs.keys() & {"pixel_values", "patch_features"}:
            inputs.update(self._no_image)
        return inputs

    def _sample(self, number: int) -> dict[str, Any]:
        with self._reading:
            row = self._rows.read(number)
        return model_inputs(row, self._processor)


def model_inputs(row: dict[str, Any], processor: FlashSlothProcessor) -> dict[str, Any]:
    """The part of a stored row that a batch is made of; an image stored as encoded bytes is decoded here."""
    sample: dict[str, Any] = {name: row[name] for name in ("input_ids", "labels", "question_ids")}
    if row.get("image_bytes") is not None:
        # Whether a GIF may stand for its first frame was decided when the rows were prepared.
        image = decode_image(row["image_bytes"], formats=WITH_GIF)
        sample["pixel_values"] = processor.image_processor.to_uint8(image)
    for name in ("pixel_values", "patch_features"):
        if row.get(name) is not None:
            sample[name] = row[name]
    return sample


def _shares(
    batches: Iterator[GlobalBatch], rank: int, world_size: int, micro_batch: int
) -> Iterator[tuple[GlobalBatch, bool, np.ndarray]]:
    for batch in batches:
        steps = split(batch.rows, world_size, micro_batch)
        for index, shares in enumerate(steps):
            yield batch, index == len(steps) - 1, shares[rank]


def _no_image(rows: PreparedRows, processor: FlashSlothProcessor) -> dict[str, torch.Tensor]:
    """The image tensor of a micro-batch without images: zero entries of the payload's shape.

    The model then runs its image parts once on zeros, so that every rank runs the same modules (DeepSpeed#7170 and
    Qwen3-VL#126 are hangs that come from leaving them out).
    """
    for manifest in (dataset.manifest for dataset in rows.datasets):
        if manifest.payload == "features" and manifest.image_shape:
            return {"patch_features": torch.zeros(0, *manifest.image_shape, dtype=torch.float16)}
    side = processor.image_processor.size
    tiles = processor.image_processor.num_tiles
    return {"pixel_values": torch.zeros(0, tiles, 3, side, side, dtype=torch.uint8)}
