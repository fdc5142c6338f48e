"""How one row of a batch chooses its next token, by its own rules and its own random numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn and where it ends.

    Attributes:
        max_tokens: longest answer in tokens.
        temperature: 0 takes the likeliest token; above, logits are divided by it.
        top_p: draw from the smallest set of likeliest tokens that holds this much probability.
        stop: texts before which the answer ends.
        seed: makes the draw reproducible, whatever else is in the batch.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}, an answer has at least 1 token")
        if self.temperature < 0:
            raise ValueError(f"temperature is {self.temperature}, it cannot be negative")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}, it must lie in (0, 1]")


class TokenChooser:
    """Chooses one row's tokens. Draws on the CPU: the same seed then gives the same answer on any device."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = torch.Generator()
        if sampling.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(sampling.seed)

    def choose(self, logits: torch.Tensor) -> int:
        """The next token's id, from logits float32[vocabulary]."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        probabilities = torch.softmax(logits.cpu().double() / self.sampling.temperature, dim=-1)
        if self.sampling.top_p < 1:
            probabilities = _nucleus(probabilities, self.sampling.top_p)
        # By the inverse of the distribution, in vocabulary order: the last bit of a logit, which depends on the size of
        # the batch, then moves the edges by a hair, where sampling from a sorted list could change every later draw.
        edges = probabilities.cumsum(0)
        drawn = torch.rand(1, generator=self._random, dtype=torch.float64) * edges[-1]
        return int(torch.searchsorted(edges, drawn, right=True).clamp(max=len(edges) - 1))


def _nucleus(probabilities: torch.Tensor, top_p: float) -> torch.Tensor:
    """Zero all but the smallest set of likeliest tokens that holds `top_p`; the likeliest always stays."""
    ordered, ids = probabilities.sort(descending=True, stable=True)
    kept = ordered.cumsum(0) - ordered < top_p
    return probabilities * torch.zeros_like(kept).scatter(0, ids, kept)
