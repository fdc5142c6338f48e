"""One rank's rows -> its micro-batches, read ahead of the step by threads."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
import torch

from flashsloth import FlashSlothProcessor
from flashsloth.collation import IGNORED_LABEL, collate, collate_packed
from flashsloth.image_processing_flashsloth import WITH_GIF, decode_image
from pipelines.feed.batches import GlobalBatch
from pipelines.feed.rows import PreparedRows
from pipelines.feed.sharing import Share, TokenBudget, deal


@dataclass(frozen=True)
class MicroBatch:
    """What one rank does in one micro-step."""

    batch: GlobalBatch
    is_last: bool
    """True for the micro-step that completes the global batch."""
    inputs: dict[str, torch.Tensor]
    """`input_ids, attention_mask, labels, question_ids` int64[B, S] (packed: `position_ids` for `attention_mask`) and
    `pixel_values` uint8[N, T, 3, H, W] or `patch_features` float16[N, T, P, D]; N is 0 where no row has an image."""
    loss_tokens: float
    """What the sum of the tokens' losses is divided by (`num_items_in_batch` of the model): the loss tokens of the
    global batch over the number of ranks, since gradients are averaged over ranks. So loss and gradients depend neither
    on the micro-batch nor on the number of workers."""
    num_tokens: int
    """Positions that hold a token of this rank's share; all others are padding."""

    @property
    def num_positions(self) -> int:
        """Positions of the batch, padding included."""
        return self.inputs["input_ids"].numel()


class BatchLoader:
    """One rank's micro-batches, read ahead of the step by threads. Iterate once; use as a context manager.

    Args:
        rows: Where the rows come from.
        batches: The global batches, in order.
        rank: This rank.
        world_size: Number of ranks.
        micro_batch: Rows per rank and micro-step, or what a micro-batch may hold.
        processor: Decodes the images of payload `original` and names the padding token.
        threads: Rows that are read and decoded at once; several hide the latency of an object store.
        prefetch: Micro-batches kept ready.
        pin_memory: Put the tensors where a GPU fetches them without holding up the process.

    Raises:
        BudgetError: A row is longer than a micro-batch may be.
    """

    def __init__(
        self,
        rows: PreparedRows,
        batches: Iterator[GlobalBatch],
        *,
        rank: int,
        world_size: int,
        micro_batch: int | TokenBudget,
        processor: FlashSlothProcessor,
        threads: int = 1,
        prefetch: int = 4,
        pin_memory: bool = False,
    ) -> None:
        if isinstance(micro_batch, TokenBudget):
            micro_batch.check(rows.num_tokens)
        self.waited_s = 0.0
        self._rows = rows
        self._batches = batches
        self._rank, self._world_size, self._micro_batch = rank, world_size, micro_batch
        self._processor = processor
        self._no_image = _no_image(rows, processor)
        self._prefetch = prefetch
        self._pin_memory = pin_memory
        self._readers = ThreadPoolExecutor(threads, thread_name_prefix="feed-read")
        self._assembler = ThreadPoolExecutor(1, thread_name_prefix="feed-batch")

    def __enter__(self) -> BatchLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pool in (self._readers, self._assembler):
            pool.shutdown(wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[MicroBatch]:
        shares = self._shares()
        pending: deque[Future[MicroBatch]] = deque()
        while True:
            while len(pending) < self._prefetch and (share := next(shares, None)):
                pending.append(self._submit(*share))
            if not pending:
                return
            started = time.perf_counter()
            micro_batch = pending.popleft().result()
            self.waited_s += time.perf_counter() - started
            yield micro_batch

    def _shares(self) -> Iterator[tuple[GlobalBatch, bool, Share]]:
        for batch in self._batches:
            steps = deal(batch.rows, self._world_size, self._micro_batch, self._rows.num_tokens, self._rows.has_image)
            for index, shares in enumerate(steps):
                yield batch, index == len(steps) - 1, shares[self._rank]

    def _submit(self, batch: GlobalBatch, is_last: bool, share: Share) -> Future[MicroBatch]:
        # A rank without a row still runs the model, as its peers wait for it: on the batch's shortest row.
        lines = share or [batch.rows[-1:]]
        samples = [[self._readers.submit(self._sample, int(row)) for row in line] for line in lines]
        return self._assembler.submit(self._assemble, batch, is_last, share, samples)

    def _assemble(
        self, batch: GlobalBatch, is_last: bool, share: Share, reading: list[list[Future[dict[str, Any]]]]
    ) -> MicroBatch:
        lines = [[sample.result() for sample in line] for line in reading]
        if not share:  # with no label, so that neither loss nor gradients notice
            lines = [[sample | {"labels": np.full_like(sample["labels"], IGNORED_LABEL)} for sample in lines[0]]]
        pad_token_id = self._processor.pad_token_id
        if isinstance(self._micro_batch, TokenBudget) and self._micro_batch.line:
            inputs = collate_packed(lines, pad_token_id)
        else:
            inputs = collate([sample for line in lines for sample in line], pad_token_id)
        if not inputs.keys() & {"pixel_values", "patch_features"}:
            inputs.update(self._no_image)
        if self._pin_memory:
            inputs = {name: tensor.pin_memory() for name, tensor in inputs.items()}
        return MicroBatch(
            batch,
            is_last,
            inputs,
            loss_tokens=max(1, batch.num_loss_tokens) / self._world_size,
            num_tokens=sum(int(self._rows.num_tokens[line].sum()) for line in share),
        )

    def _sample(self, row: int) -> dict[str, Any]:
        return model_inputs(self._rows.read(row), self._processor)


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
