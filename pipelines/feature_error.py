"""What storing features in 8 bits costs a model and saves on disk, measured on prepared rows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.collation import IGNORED_LABEL, collate
from pipelines.shards.quantization import dequantize, quantize
from pipelines.shards.reader import ShardedDataset

_INPUTS = ("input_ids", "labels", "question_ids", "patch_features")


@dataclass(frozen=True)
class Int8Error:
    """Features in int8 against the same in float16."""

    rows: int
    loss_float16: float
    """Mean over all loss tokens of the rows."""
    loss_int8: float
    feature_error: float
    """Root of the mean square error of a feature, as a share of the root of its mean square."""
    bytes_share: float
    """Of an image in int8, scales included, of the one in float16."""

    @property
    def loss_change(self) -> float:
        """Relative change of the loss."""
        return self.loss_int8 / self.loss_float16 - 1

    def __str__(self) -> str:
        return (
            f"int8 features take {self.bytes_share:.1%} of float16's bytes; loss over {self.rows} rows "
            f"{self.loss_float16:.5f} -> {self.loss_int8:.5f} ({self.loss_change:+.3%}), features off by "
            f"{self.feature_error:.2%}"
        )


@torch.inference_mode()
def measure_int8(
    model: FlashSlothForConditionalGeneration,
    processor: FlashSlothProcessor,
    dataset: ShardedDataset,
    max_rows: int = 256,
    batch_size: int = 8,
) -> Int8Error:
    """Compare the loss of `model` on the rows with an image of `dataset`, which holds float16 features.

    Raises:
        ValueError: the dataset holds something else, or no image.
    """
    if (dataset.manifest.payload, dataset.manifest.image_dtype) != ("features", "float16"):
        raise ValueError(
            f"{dataset.folder} holds {dataset.manifest.payload} of {dataset.manifest.image_dtype}; the error of int8 "
            "is measured against features of float16"
        )
    indices = np.flatnonzero(dataset.has_image)[:max_rows]
    if not len(indices):
        raise ValueError(f"{dataset.folder} holds no row with an image")
    losses, squares, tokens, sizes = np.zeros(2), np.zeros(2), 0, np.zeros(2)
    for start in range(0, len(indices), batch_size):
        rows = [{name: row[name] for name in _INPUTS} for row in map(dataset.read, indices[start : start + batch_size])]
        coarse = []
        for row in rows:
            exact = row["patch_features"]
            numbers, scales = quantize(exact)
            coarse.append(row | {"patch_features": dequantize(numbers, scales)})
            difference = coarse[-1]["patch_features"].astype(np.float64) - exact
            squares += [np.square(difference).sum(), np.square(exact.astype(np.float64)).sum()]
            sizes += [numbers.nbytes + scales.nbytes, exact.nbytes]
        count = sum(int((row["labels"][1:] != IGNORED_LABEL).sum()) for row in rows)
        losses += [_loss(model, processor, each) * count for each in (rows, coarse)]
        tokens += count
    return Int8Error(
        rows=len(indices),
        loss_float16=losses[0] / tokens,
        loss_int8=losses[1] / tokens,
        feature_error=float(np.sqrt(squares[0] / squares[1])),
        bytes_share=sizes[0] / sizes[1],
    )


def _loss(model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, rows: list[dict]) -> float:
    batch = {name: tensor.to(model.device) for name, tensor in collate(rows, processor.pad_token_id).items()}
    batch["patch_features"] = batch["patch_features"].to(model.dtype)
    return float(model(**batch).loss)
