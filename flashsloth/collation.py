"""Samples -> padded batch. The only padding code: prepare, training, evaluation and serving all come through here."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

IGNORED_LABEL = -100
IMAGE_KEYS = ("pixel_values", "patch_features")

Sample = Mapping[str, Any]


def collate(samples: Sequence[Sample], pad_token_id: int, padding_side: str = "right") -> dict[str, Tensor]:
    """Pads sequences to the longest and stacks images.

    Args:
        samples: each with `input_ids`, `question_ids` and maybe `labels`, ints of one length, and, if it has an image,
            `pixel_values` (uint8 or float `[T, 3, H, W]`) or `patch_features` (`[T, P, D]`). Lists, arrays or tensors.
        pad_token_id: fills `input_ids`.
        padding_side: "right" for training, "left" for generation.

    Returns:
        `input_ids, attention_mask, question_ids: int64[B, S]`, `labels: int64[B, S]` if the samples have them (padding
        is -100), and `pixel_values` or `patch_features` with one entry per sample that has an image, in order, dtype
        kept. A batch without any image has neither key.

    Raises:
        ValueError: for no samples, lengths or shapes that differ, labels or payloads that only some samples have.
    """
    if not samples:
        raise ValueError("no samples to collate")
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side is {padding_side!r}; it must be 'left' or 'right'")
    fills = {"input_ids": pad_token_id, "question_ids": 0}
    labelled = [index for index, sample in enumerate(samples) if "labels" in sample]
    if labelled:
        if len(labelled) != len(samples):
            raise ValueError(f"{len(labelled)} of {len(samples)} samples have labels; all or none must")
        fills["labels"] = IGNORED_LABEL

    lengths = [_length(sample, fills, index) for index, sample in enumerate(samples)]
    batch = {
        key: _padded([sample[key] for sample in samples], lengths, fill, padding_side) for key, fill in fills.items()
    }
    batch["attention_mask"] = _padded([np.ones(length) for length in lengths], lengths, 0, padding_side)
    return batch | _stacked_images(samples)


def _length(sample: Sample, keys: Mapping[str, int], index: int) -> int:
    length = len(sample["input_ids"])
    for key in keys:
        if len(sample[key]) != length:
            raise ValueError(f"sample {index}: {len(sample[key])} {key} for {length} input_ids")
    return length


def _padded(rows: Sequence[Any], lengths: Sequence[int], fill: int, padding_side: str) -> Tensor:
    width = max(lengths)
    table = np.full((len(rows), width), fill, dtype=np.int64)
    for index, (row, length) in enumerate(zip(rows, lengths, strict=True)):
        start = width - length if padding_side == "left" else 0
        table[index, start : start + length] = np.asarray(row)
    return torch.from_numpy(table)


def _stacked_images(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Images of the samples that have one, under the one key that they share."""
    owners = {key: [index for index, sample in enumerate(samples) if sample.get(key) is not None] for key in IMAGE_KEYS}
    used = [key for key in IMAGE_KEYS if owners[key]]
    if not used:
        return {}
    if len(used) > 1:
        raise ValueError(
            f"sample {owners[used[0]][0]} brings {used[0]}, sample {owners[used[1]][0]} brings {used[1]}; "
            "a batch holds one kind of image payload"
        )
    key, first = used[0], owners[used[0]][0]
    images = [np.asarray(samples[index][key]) for index in owners[key]]
    for index, image in zip(owners[key], images, strict=True):
        if image.shape != images[0].shape:
            raise ValueError(
                f"{key} of sample {index} is {image.shape}, of sample {first} {images[0].shape}; "
                "one tiling and size per batch"
            )
    return {key: torch.from_numpy(np.stack(images))}
