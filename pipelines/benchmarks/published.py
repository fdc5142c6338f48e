"""The published forward, stated again plainly, to measure against: loops where ours has tensors.

It runs on the weights of our modules, so that both compute the same loss. README says what else differs from the
released code; nothing of that is copied here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PhiModel
from transformers.activations import ACT2FN

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.embedded_query import EmbeddedQuery, QueryAttention, QueryPlan
from flashsloth.pooling import SpatialAttentionPooling


def loop_pooling(module: SpatialAttentionPooling, patches: torch.Tensor) -> torch.Tensor:
    """Pool region after region: float[B, P, D] to float[B, R, D]."""
    side = module.grid * module.size
    grid = patches.view(patches.shape[0], side, side, -1)
    pooled = []
    for row in range(module.grid):
        for column in range(module.grid):
            top, left = row * module.size, column * module.size
            region = grid[:, top : top + module.size, left : left + module.size].flatten(1, 2)
            scores = module.score_out(module.dropout(torch.relu(module.score_in(region))))
            pooled.append((region * scores.float().softmax(dim=1).to(region.dtype)).sum(dim=1))
    return torch.stack(pooled, dim=1)


def loop_queries(
    module: EmbeddedQuery, hidden_states: torch.Tensor, patches: torch.Tensor, plan: QueryPlan, per_turn: int
) -> torch.Tensor:
    """Row after row and turn after turn, with keys and values of the image computed for every turn."""
    result = hidden_states.clone()
    slots_per_row, length = plan.visible.shape[2:]
    split = (each.view(-1, per_turn) for each in (plan.positions, plan.row_slots, plan.image_slots))
    for positions, row_slots, image_slots in zip(*split, strict=True):
        image = int(image_slots[0]) // plan.slots_per_image
        row, queries = int(positions[0]) // length, positions % length
        asked = plan.visible[int(row_slots[0]) // slots_per_row, 0, int(row_slots[0]) % slots_per_row]
        query = module.norm_query(module.down_text(hidden_states[row, queries]))
        text = module.norm_text(module.down_text(hidden_states[row, asked]))
        keys = module.norm_image(module.down_image(patches[image]))
        question = _attend(module.text_attention, query, text, text)
        found = module.up(_attend(module.image_attention, question, keys, patches[image]))
        result[row, queries] = hidden_states[row, queries] + found
    return result


def _attend(module: QueryAttention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    q, k, v = (
        projection(states).unflatten(-1, (module.num_heads, -1)).transpose(0, 1)
        for projection, states in ((module.q_proj, query), (module.k_proj, key), (module.v_proj, value))
    )
    return F.scaled_dot_product_attention(q, k, v).transpose(0, 1).flatten(1)


@contextmanager
def published_parts(
    model: FlashSlothForConditionalGeneration,
    pooling: bool,
    queries: bool,
    activation: bool = False,
    attention: bool = False,
) -> Iterator[FlashSlothForConditionalGeneration]:
    """`model` with some parts computed as published, inside the `with`.

    Args:
        model: changed for that while.
        pooling: spatial attention pooling in a loop.
        queries: the embedded query module in a loop.
        activation: Phi's, as transformers spells it out.
        attention: transformers' own over whole rows, with a mask for padding and for packed samples.
    """
    language_model = model.model.language_model
    layer = language_model.layers[model.config.query_layer]
    changed: list[nn.Module] = []
    own_attention = language_model.config._attn_implementation
    own_activations = [each.mlp.activation_fn for each in language_model.layers]
    if attention:
        language_model.config._attn_implementation = "sdpa"
    if activation:
        _activate(language_model, [ACT2FN[language_model.config.hidden_act] for _ in own_activations])
    if pooling:
        module = model.model.pooling
        module.__dict__["forward"] = lambda patches: loop_pooling(module, patches)
        changed.append(module)
    if queries:
        embedded, per_turn = layer.embedded_query, model.config.num_query_tokens
        embedded.__dict__["forward"] = partial(loop_queries, embedded, per_turn=per_turn)
        changed.append(embedded)
    try:
        yield model
    finally:
        for each in changed:
            del each.__dict__["forward"]  # the method of the class shows again
        language_model.config._attn_implementation = own_attention
        _activate(language_model, own_activations)


def _activate(language_model: PhiModel, activations: list[nn.Module]) -> None:
    for layer, activation in zip(language_model.layers, activations, strict=True):
        layer.mlp.activation_fn = activation


def zero_image_pass(model: FlashSlothForConditionalGeneration, pixels: torch.Tensor, count: int) -> torch.Tensor:
    """What `count` rows of text send through tower, pooling and projector: zero images. Adds 0 to a loss."""
    zeros = pixels.new_zeros((count, *pixels.shape[1:]))
    return 0.0 * model.get_image_features(zeros).pooler_output.mean()


def published_shares(lengths: np.ndarray, micro_batch: int, world_size: int) -> list[np.ndarray]:
    """How the published sampler deals a global batch out: longest first, each row to the rank with least so far.

    So every rank gets long and short rows, and pads the short ones to the longest.

    Args:
        lengths: int[n] of the rows of the batch, n <= micro_batch * world_size.
        micro_batch: Rows of a rank at most.
        world_size: Number of ranks.
    """
    held: list[list[int]] = [[] for _ in range(world_size)]
    sums = [0] * world_size
    for row in np.argsort(-lengths, kind="stable").tolist():
        rank = min((r for r in range(world_size) if len(held[r]) < micro_batch), key=lambda r: sums[r])
        held[rank].append(row)
        sums[rank] += int(lengths[row])
    return [np.array(rows) for rows in held if rows]
