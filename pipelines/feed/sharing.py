"""A global batch -> `[micro-step][rank] -> lines`. The only place that knows the world size.

A line is one row of the tensors that go through the model: a sample, or several that are packed. Every rank gets the
same number of micro-steps, as it must: ranks meet in each forward and backward. In one micro-step all of them get work
of a similar size, since the slowest one holds up the others. Where there are fewer lines than ranks, shares are empty.

How the batch is dealt out changes no loss and no gradient: both are sums over the loss tokens of the global batch.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Line = np.ndarray
"""int64[>= 1], the rows that stand one behind the other in a line."""
Share = list[Line]
"""What one rank does in one micro-step."""


class BudgetError(ValueError):
    """A row does not fit into a micro-batch; the message names both numbers."""


@dataclass(frozen=True)
class TokenBudget:
    """Micro-batches of as many lines as fit, instead of a fixed number of rows."""

    tokens: int
    """Positions of a micro-batch, padding included: lines x the longest of them."""
    images: int | None = None
    """Images of a micro-batch; the tower's memory goes with them. None: any number."""
    line: int | None = None
    """Pack samples into lines of up to this many tokens. None: a line for each sample."""

    def check(self, num_tokens: np.ndarray) -> None:
        """Raise `BudgetError` unless every row fits, given their lengths int[N]."""
        room = self.tokens if self.line is None else min(self.line, self.tokens)
        if not len(num_tokens):
            return
        longest = int(np.argmax(num_tokens))
        if num_tokens[longest] > room:
            what = "a micro-batch may hold" if room == self.tokens else "a line may hold"
            raise BudgetError(f"row {longest} has {int(num_tokens[longest])} tokens, {what} {room}: raise the budget")


def deal(
    rows: np.ndarray, world_size: int, micro_batch: int | TokenBudget, num_tokens: np.ndarray, has_image: np.ndarray
) -> list[list[Share]]:
    """Deal a global batch out to micro-steps and ranks.

    Args:
        rows: int64[n], the rows of the batch, longest first.
        world_size: Number of ranks.
        micro_batch: Rows of a micro-batch, or what it may hold.
        num_tokens: int[N], length of every row of the data.
        has_image: bool[N].

    Returns:
        `[micro-step][rank]` -> lines. Together they hold each of `rows` once.
    """
    if isinstance(micro_batch, int):
        shares = _even(rows, world_size, micro_batch)
    elif micro_batch.line is None:
        shares = _budgeted(rows, world_size, micro_batch, num_tokens, has_image)
    else:
        shares = _packed(rows, world_size, micro_batch, num_tokens, has_image)
    return [shares[start : start + world_size] for start in range(0, len(shares), world_size)]


def _even(rows: np.ndarray, world_size: int, micro_batch: int) -> list[Share]:
    """At most `micro_batch` rows each, neighbours of similar length; a short batch is evened out."""
    num_steps = -(-len(rows) // (world_size * micro_batch))
    return [np.split(share, len(share)) if len(share) else [] for share in np.array_split(rows, num_steps * world_size)]


def _budgeted(
    rows: np.ndarray, world_size: int, budget: TokenBudget, num_tokens: np.ndarray, has_image: np.ndarray
) -> list[Share]:
    """Runs of neighbours, as few micro-steps as the budget allows, and then as even as they can be."""
    lengths, images = num_tokens[rows].tolist(), has_image[rows].tolist()
    at_once = budget.images or len(rows)

    def runs(tokens: int) -> list[int]:
        """Where a new micro-batch begins, if each may have `tokens` positions: the longest row is its first."""
        starts: list[int] = []
        held = 0
        for index, image in enumerate(images):
            if not starts or lengths[starts[-1]] * (index - starts[-1] + 1) > tokens or held + image > at_once:
                starts.append(index)
                held = 0
            held += image
        return starts

    wanted = -(-len(runs(budget.tokens)) // world_size) * world_size
    low, high = lengths[0], max(budget.tokens, lengths[0])
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if len(runs(middle)) <= wanted else (middle + 1, high)
    shares = np.split(rows, runs(low)[1:])
    while len(shares) < min(wanted, len(rows)):  # no rank shall idle while another has two rows
        largest = max(range(len(shares)), key=lambda i: (len(shares[i]) > 1, int(num_tokens[shares[i]].sum())))
        shares[largest : largest + 1] = np.array_split(shares[largest], 2)
    filled = [np.split(share, len(share)) for share in shares]
    return filled + [[] for _ in range(wanted - len(filled))]


def _packed(
    rows: np.ndarray, world_size: int, budget: TokenBudget, num_tokens: np.ndarray, has_image: np.ndarray
) -> list[Share]:
    """Lines of nearly equal length, the same number for every rank in every micro-step."""
    line = min(budget.line or budget.tokens, budget.tokens)
    at_once = budget.images or len(rows)
    most = budget.tokens // line
    num_steps = 1
    while True:
        num_shares = num_steps * world_size
        fewest = -(-int(num_tokens[rows].sum()) // line)
        for lines_each in range(-(-fewest // num_shares), most + 1):
            lines = _level(rows, lines_each * num_shares, num_tokens)
            if int(num_tokens[lines[0]].sum()) > line:
                continue
            shares = [lines[start : start + lines_each] for start in range(0, len(lines), lines_each)]
            if max(sum(int(has_image[each].sum()) for each in share) for share in shares) <= at_once:
                return shares + [[] for _ in range(num_shares - len(shares))]
        num_steps += 1


def _level(rows: np.ndarray, num_lines: int, num_tokens: np.ndarray) -> list[Line]:
    """Deal each of `rows`, longest first, to the line that is shortest so far; empty lines are left out."""
    fill = [(0, number) for number in range(num_lines)]
    lines: list[list[int]] = [[] for _ in fill]
    for row in rows.tolist():
        tokens, number = heapq.heappop(fill)
        lines[number].append(row)
        heapq.heappush(fill, (tokens + int(num_tokens[row]), number))
    longest_first = sorted(fill, key=lambda entry: (-entry[0], entry[1]))
    return [np.array(lines[number]) for tokens, number in longest_first if tokens]


def padding_share(shares: Sequence[Share], num_tokens: np.ndarray) -> float:
    """The share of all positions of `shares` that are padding."""
    lengths = [[int(num_tokens[line].sum()) for line in share] for share in shares if share]
    return 1 - sum(map(sum, lengths)) / sum(len(each) * max(each) for each in lengths)
