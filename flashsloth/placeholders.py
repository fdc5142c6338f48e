"""The border of the model: placeholders, images, query tokens and turns must agree in number, or nothing runs."""

from __future__ import annotations

import torch
from torch import nn

from .configuration_flashsloth import FlashSlothConfig
from .embedded_query import QueryPlan


def check_images(image_mask: torch.Tensor, visual_tokens: torch.Tensor | None, per_image: int) -> None:
    """Raise `ValueError` unless every placeholder has its visual token, and every row whole images.

    Args:
        image_mask: bool[B, S], image placeholders.
        visual_tokens: float[N, per_image, D], or None where there is no image.
        per_image: visual tokens of an image.
    """
    placeholders = int(image_mask.sum())
    features = 0 if visual_tokens is None else visual_tokens.shape[0] * visual_tokens.shape[1]
    if placeholders != features:
        raise ValueError(
            f"{placeholders} image placeholders stand in input_ids, the images give {features} visual tokens "
            f"({per_image} each): give one image for every {per_image} placeholders"
        )
    uneven = (image_mask.sum(1) % per_image).nonzero()
    if len(uneven):
        row = int(uneven[0])
        raise ValueError(
            f"row {row} has {int(image_mask[row].sum())} image placeholders, no multiple of {per_image} an image"
        )


def count_turns(query_mask: torch.Tensor, per_turn: int) -> int:
    """The number of turns that the query tokens bool[B, S] make.

    Raises:
        ValueError: they make no whole number of turns.
    """
    count = int(query_mask.sum())
    if count % per_turn:
        raise ValueError(f"{count} query tokens are no whole number of turns of {per_turn}")
    return count // per_turn


def number_samples(position_ids: torch.Tensor) -> torch.Tensor | None:
    """The sample that each position of packed rows belongs to, int64[B, S] from 0; None where every row is one sample.

    A sample begins wherever `position_ids` int64[B, S] does not count on by one. transformers reads its block-diagonal
    mask off the same rule (`masking_utils.find_packed_sequence_indices`), so that both agree.
    """
    begins = position_ids.diff(dim=1) != 1
    return nn.functional.pad(begins.cumsum(dim=1), (1, 0)) if bool(begins.any()) else None


def plan_queries(
    input_ids: torch.Tensor,
    question_ids: torch.Tensor | None,
    config: FlashSlothConfig,
    sample_ids: torch.Tensor | None = None,
) -> QueryPlan:
    """Check `question_ids` int64[B, S] against `input_ids` int64[B, S] and plan what EmbQ reads.

    In packed rows, `sample_ids` int64[B, S] keeps the samples' questions and images apart.

    Raises:
        ValueError: it is missing or of another shape, or a turn does not carry its query tokens.
    """
    if question_ids is None:
        raise ValueError("question_ids is missing: images were given, and EmbQ reads each turn's question")
    if question_ids.shape != input_ids.shape:
        raise ValueError(
            f"question_ids has shape {tuple(question_ids.shape)}, input_ids {tuple(input_ids.shape)}: they go "
            "together position by position (chunked prefill is not possible, a question may not be cut)"
        )
    query_mask = input_ids == config.query_token_id
    _check_turns(query_mask, question_ids, config.num_query_tokens, sample_ids)
    image_mask = input_ids == config.image_token_id
    return QueryPlan.build(question_ids, query_mask, image_mask, config.num_image_tokens, sample_ids)


def _check_turns(
    query_mask: torch.Tensor, question_ids: torch.Tensor, per_turn: int, sample_ids: torch.Tensor | None
) -> None:
    turns = question_ids[query_mask].view(-1, per_turn)
    rows = query_mask.nonzero()[:, 0].view_as(turns)
    # A turn must not go on in the next group of query tokens, unless that is another sample's.
    samples = rows if sample_ids is None else sample_ids[query_mask].view_as(turns)
    same = (rows == rows[:, :1]) & (samples == samples[:, :1])
    whole = ((turns == turns[:, :1]) & same & (turns > 0)).all(dim=1)
    whole[1:] &= (turns[1:, 0] != turns[:-1, 0]) | (rows[1:, 0] != rows[:-1, 0]) | (samples[1:, 0] != samples[:-1, 0])
    if bool(whole.all()):
        return
    at = int((~whole).nonzero()[0])
    row, turn = int(rows[at, 0]), int(turns[at, 0])
    carry = query_mask[row] & (question_ids[row] == turn)
    if sample_ids is not None:
        carry &= sample_ids[row] == samples[at, 0]
    count = int(carry.sum())
    raise ValueError(
        f"row {row}, turn {turn}: {count} query tokens carry this turn in question_ids, "
        f"the model takes {per_turn} a turn"
    )
