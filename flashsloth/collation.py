"""Samples -> padded batch. The only padding code: prepare, training, evaluation and serving all come through here.

`collate` gives every sample a line of the batch. `collate_packed` puts several into one, for training: their positions
start again at 0, which is how the model keeps them apart.
"""

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
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side is {padding_side!r}; it must be 'left' or 'right'")
    fills = _fills(samples, pad_token_id)
    batch = {key: _padded([sample[key] for sample in samples], fill, padding_side) for key, fill in fills.items()}
    batch["attention_mask"] = _padded([np.ones(len(sample["input_ids"])) for sample in samples], 0, padding_side)
    return batch | _stacked_images(samples)


def collate_packed(lines: Sequence[Sequence[Sample]], pad_token_id: int) -> dict[str, Tensor]:
    """Puts the samples of a line one behind the other and pads the lines to the longest.

    Loss and gradients are those of the samples on lines of their own: none attends to another, none asks another's
    image, and no last token has to foresee the first one of its neighbour.

    Args:
        lines: the samples of each line, as `collate` takes them.
        pad_token_id: fills `input_ids`.

    Returns:
        What `collate` returns, with `position_ids: int64[B, S]`, from 0 in every sample, in place of `attention_mask`.
        Padding counts from 0 as well: to the model it is one more sample, and nobody's neighbour.

    Raises:
        ValueError: as `collate`, and for an empty line.
    """
    samples = [sample for line in lines for sample in line]
    fills = _fills(samples, pad_token_id)
    if empty := [index for index, line in enumerate(lines) if not line]:
        raise ValueError(f"line {empty[0]} of {len(lines)} holds no sample")
    joined = [{key: np.concatenate([np.asarray(sample[key]) for sample in line]) for key in fills} for line in lines]
    positions = [np.concatenate([np.arange(len(sample["input_ids"])) for sample in line]) for line in lines]
    if "labels" in fills:
        for line, start in zip(joined, positions, strict=True):
            line["labels"] = np.where(start == 0, IGNORED_LABEL, line["labels"])
    batch = {key: _padded([line[key] for line in joined], fill, "right") for key, fill in fills.items()}
    width = batch["input_ids"].shape[1]
    counted = [np.concatenate([line, np.arange(width - len(line))]) for line in positions]
    batch["position_ids"] = torch.from_numpy(np.stack(counted))
    return batch | _stacked_images(samples)


def _fills(samples: Sequence[Sample], pad_token_id: int) -> dict[str, int]:
    """The keys of a batch of `samples`, which are checked, and what each is filled up with."""
    if not samples:
        raise ValueError("no samples to collate")
    fills = {"input_ids": pad_token_id, "question_ids": 0}
    labelled = sum("labels" in sample for sample in samples)
    if labelled:
        if labelled != len(samples):
            raise ValueError(f"{labelled} of {len(samples)} samples have labels; all or none must")
        fills["labels"] = IGNORED_LABEL
    for index, sample in enumerate(samples):
        for key in fills:
            if len(sample[key]) != len(sample["input_ids"]):
                raise ValueError(f"sample {index}: {len(sample[key])} {key} for {len(sample['input_ids'])} input_ids")
    return fills


def _padded(rows: Sequence[Any], fill: int, padding_side: str) -> Tensor:
    width = max(len(row) for row in rows)
    table = np.full((len(rows), width), fill, dtype=np.int64)
    for index, row in enumerate(rows):
        start = width - len(row) if padding_side == "left" else 0
        table[index, start : start + len(row)] = np.asarray(row)
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
