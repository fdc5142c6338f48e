"""The embedded query module (EmbQ): query tokens fetch from the image what the question asks for (paper, section 3.3).

Shapes: N images, P patches of an image (all its tiles), S positions of a row, B rows, R of them with images (as many as
images, unless rows are packed), C query slots of an image and E of a row (the most that any has), H heads, D widths.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .configuration_flashsloth import FlashSlothConfig


@dataclass
class QueryPlan:
    """Which query token looks at which question and which image. Made once per forward, plain index tensors.

    Grouping the queries by image, not by turn, is what lets the keys and values of an image be computed once.
    """

    rows: torch.Tensor
    """int64[R]: the rows that hold an image."""
    positions: torch.Tensor
    """int64[M]: place of each query token in the flattened batch, row * S + s. Only queries that have an image."""
    row_slots: torch.Tensor
    """int64[M]: its place in the flattened table of slots by row, r * E + e."""
    visible: torch.Tensor
    """bool[R, 1, E, S]: the question tokens that a slot may look at. Unused slots see all, so that no row is empty."""
    image_slots: torch.Tensor
    """int64[M]: its place in the flattened table of slots by image, n * C + c."""
    slots_per_image: int
    """C."""

    @classmethod
    def build(
        cls,
        question_ids: torch.Tensor,
        query_mask: torch.Tensor,
        image_mask: torch.Tensor,
        num_image_tokens: int,
        sample_ids: torch.Tensor | None = None,
    ) -> QueryPlan:
        """Assign query tokens to questions and images.

        Args:
            question_ids: int64[B, S], k where the token belongs to the question or the query tokens of turn k, else 0.
            query_mask: bool[B, S], query tokens.
            image_mask: bool[B, S], image placeholders.
            num_image_tokens: placeholders of one image.
            sample_ids: int64[B, S], in packed rows the sample that a position belongs to; None where a row is one.

        Raises:
            ValueError: a turn with an image has no question token.
        """
        length = question_ids.shape[1]
        starts = image_mask.flatten().nonzero().squeeze(1)[::num_image_tokens].contiguous()
        rows = starts // length
        # The image of a query is the last one that began before it in its row; queries without one are left out.
        positions = query_mask.flatten().nonzero().squeeze(1)
        image = torch.searchsorted(starts, positions, right=True) - 1
        nearest = image.clamp(min=0)
        owned = (image >= 0) & (rows[nearest] == positions // length)
        if sample_ids is not None and len(starts):
            owned &= sample_ids.flatten()[starts[nearest]] == sample_ids.flatten()[positions]
        positions, image = positions[owned], image[owned]
        holders, holder_of = torch.unique_consecutive(rows, return_inverse=True)
        image_slots, slots_per_image = _numbered(image, len(starts))
        row_slots, slots_per_row = _numbered(holder_of[image], len(holders))

        turn = question_ids.flatten()[positions]
        asked = question_ids.masked_fill(query_mask, 0)[rows[image]]
        visible = asked == turn[:, None]
        if sample_ids is not None:  # turns are counted from 1 in every sample
            visible &= sample_ids[rows[image]] == sample_ids.flatten()[positions, None]
        silent = (~visible.any(dim=1)).nonzero()
        if len(silent):
            at = int(positions[silent[0, 0]])
            raise ValueError(
                f"row {at // length}, turn {int(turn[silent[0, 0]])}: its query tokens have 0 question tokens to read, "
                "at least 1 is needed; mark the question in question_ids"
            )
        table = torch.ones(len(holders) * slots_per_row, length, dtype=torch.bool, device=positions.device)
        table[row_slots] = visible
        table = table.view(len(holders), 1, slots_per_row, length)
        return cls(holders, positions, row_slots, table, image_slots, slots_per_image)

    @classmethod
    def idle(cls, length: int, num_query_tokens: int, device: torch.device) -> QueryPlan:
        """A plan for one image that no query looks at: the module runs and changes nothing."""
        none = torch.zeros(0, dtype=torch.long, device=device)
        visible = torch.ones(1, 1, num_query_tokens, length, dtype=torch.bool, device=device)
        return cls(torch.zeros(1, dtype=torch.long, device=device), none, none, visible, none, num_query_tokens)

    def to(self, device: torch.device) -> QueryPlan:
        """The plan on `device`.

        Making it takes dozens of small operations, some of which wait for their result: on the CPU, no GPU is held up.
        """
        moved: dict[str, Any] = {
            name: part.to(device) for name, part in vars(self).items() if isinstance(part, torch.Tensor)
        }
        return replace(self, **moved)


def _numbered(owner: torch.Tensor, num_owners: int) -> tuple[torch.Tensor, int]:
    """A slot for each query at its owner, int64[M] and rising: slots int64[M] of the flattened table, and its width."""
    counts = torch.bincount(owner, minlength=num_owners)
    width = max(1, int(counts.max())) if num_owners else 0  # an image that nobody asks has a slot too: no empty shapes
    first = counts.cumsum(0) - counts
    return owner * width + torch.arange(len(owner), device=owner.device) - first[owner], width


class QueryAttention(nn.Module):
    """Multi-head attention without output projection, keys of one width and values of another."""

    def __init__(self, width: int, value_width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(value_width, value_width)

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend with float[N, C, D] queries to float[N, S, D] keys and float[N, S, E] values: float[N, C, E]."""
        q, k, v = (
            projection(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection, states in ((self.q_proj, query), (self.k_proj, key), (self.v_proj, value))
        )
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible).transpose(1, 2).flatten(2)


class EmbeddedQuery(nn.Module):
    """Adds to every query token what its question finds in the un-pooled patches of its image.

    Keys and values of the image are computed once per image, whatever its number of turns.
    """

    def __init__(self, config: FlashSlothConfig):
        super().__init__()
        text, vision, inner = config.text_config.hidden_size, config.vision_config.hidden_size, config.query_hidden_size
        heads = config.text_config.num_attention_heads
        self.down_text = nn.Linear(text, inner)
        self.down_image = nn.Linear(vision, inner)
        self.norm_query = nn.LayerNorm(inner)
        self.norm_text = nn.LayerNorm(inner)
        self.norm_image = nn.LayerNorm(inner)
        self.text_attention = QueryAttention(inner, inner, heads)
        self.image_attention = QueryAttention(inner, vision, heads)
        self.up = nn.Linear(vision, text)

    def forward(self, hidden_states: torch.Tensor, patches: torch.Tensor, plan: QueryPlan) -> torch.Tensor:
        """Update the query tokens in `hidden_states` float[B, S, D] from `patches` float[N, P, V]; the rest stays."""
        num_rows, _, slots_per_row, length = plan.visible.shape
        text = self.down_text(hidden_states[plan.rows])
        query = text.new_zeros(num_rows * slots_per_row, text.shape[-1])
        # The queries are tokens of the same rows: what down_text made of them is picked, not computed again.
        query = query.index_copy(0, plan.row_slots, text[plan.row_slots // slots_per_row, plan.positions % length])
        query = self.norm_query(query).view(num_rows, slots_per_row, -1)
        text = self.norm_text(text)
        question = self.text_attention(query, text, text, plan.visible).flatten(0, 1)

        asked = question.new_zeros(len(patches) * plan.slots_per_image, question.shape[-1])
        asked = asked.index_copy(0, plan.image_slots, question[plan.row_slots])
        asked = asked.view(len(patches), plan.slots_per_image, question.shape[-1])
        keys = self.norm_image(self.down_image(patches))
        found = self.up(self.image_attention(asked, keys, patches)).flatten(0, 1)[plan.image_slots]
        flat = hidden_states.flatten(0, 1).index_add(0, plan.positions, found.to(hidden_states.dtype))
        return flat.view_as(hidden_states)
