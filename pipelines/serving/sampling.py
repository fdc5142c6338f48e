"""How the rows of a batch choose their next tokens, each by its own rules and its own random numbers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from numbers import Real

import torch

from pipelines.serving.engine_settings import MAX_STOP_LENGTH

NO_TOKEN = -1


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn and where it ends.

    Attributes:
        max_tokens: longest answer in tokens.
        temperature: 0 takes the likeliest token; above, logits are divided by it.
        top_p: draw from the smallest set of likeliest tokens that holds this much probability.
        stop: texts before which the answer ends, of up to MAX_STOP_LENGTH characters.
        seed: makes the draw reproducible, whatever else is in the batch; from -2**63 up to below 2**64.
        deadline_s: seconds from submission after which the answer ends where it is; None for no such end.
        shrinks: let an answer end where its slot does, instead of refusing a prompt that leaves less than `max_tokens`.

    Raises:
        ValueError: a field is not as above; the message names it.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None
    deadline_s: float | None = None
    shrinks: bool = False

    def __post_init__(self) -> None:
        if type(self.max_tokens) is not int or self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens!r}, it must be a whole number: at least 1 token")
        if not (_is_number(self.temperature) and 0 <= self.temperature < float("inf")):
            raise ValueError(f"temperature is {self.temperature!r}, it must be a finite number, not a negative one")
        if not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p is {self.top_p!r}, it must lie in (0, 1]")
        if isinstance(self.stop, str):
            raise ValueError(f"stop is the string {self.stop!r}; give a tuple of texts, ({self.stop!r},)")
        if not isinstance(self.stop, Collection) or not all(isinstance(text, str) for text in self.stop):
            raise ValueError(f"stop is {self.stop!r}; give a tuple of texts")
        if "" in self.stop:
            raise ValueError("stop holds an empty text, before which every answer would end")
        if any(len(text) > MAX_STOP_LENGTH for text in self.stop):
            longest = max(map(len, self.stop))
            raise ValueError(f"stop holds a text of {longest} characters, it must have at most {MAX_STOP_LENGTH}")
        if self.seed is not None and not (type(self.seed) is int and -(2**63) <= self.seed < 2**64):
            raise ValueError(f"seed is {self.seed!r}, it must be a whole number from -2**63 up to below 2**64")
        if self.deadline_s is not None and not (_is_number(self.deadline_s) and self.deadline_s > 0):
            raise ValueError(f"deadline_s is {self.deadline_s!r}, it must be above 0, or None")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


class Draws:
    """One request's random numbers. Drawn on the CPU: the same seed then gives the same answer on any device."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._number: float | None = None
        self._random: torch.Generator | None = None
        if sampling.temperature > 0:
            self._random = torch.Generator()
            if sampling.seed is None:
                self._random.seed()
            else:
                self._random.manual_seed(sampling.seed)

    @property
    def number(self) -> float:
        """The number in [0, 1) for the next token. The same until `advance`, so that a step can be tried again."""
        if self._number is None:
            self._number = float(torch.rand(1, generator=self._random, dtype=torch.float64))
        return self._number

    def advance(self) -> None:
        """Called when a token was taken."""
        self._number = None


def choose_tokens(logits: torch.Tensor, draws: Sequence[Draws]) -> list[int]:
    """The next token of each row, from logits float32[N, vocabulary]; NO_TOKEN for a row whose numbers make no sense.

    Rows may hold -inf for tokens that must not be chosen.
    """
    best, ids = logits.max(dim=1)
    drawn = [row for row, own in enumerate(draws) if own.sampling.temperature > 0]
    if drawn:
        index = torch.tensor(drawn, device=logits.device)
        ids[index] = _draw(logits[index], [draws[row] for row in drawn])
    # A NaN is the maximum of its row.
    return torch.where(best.isfinite(), ids, NO_TOKEN).tolist()


def _draw(logits: torch.Tensor, draws: Sequence[Draws]) -> torch.Tensor:
    """A token for each row, int64[N]."""
    device = logits.device
    temperatures = torch.tensor([[own.sampling.temperature] for own in draws], dtype=torch.float64, device=device)
    # Likeliest first: dividing by a temperature near 0 then cannot overflow.
    scaled = (logits.double() - logits.max(dim=1, keepdim=True).values.double()) / temperatures
    probabilities = torch.softmax(scaled, dim=1)
    narrow = [row for row, own in enumerate(draws) if own.sampling.top_p < 1]
    if narrow:
        index = torch.tensor(narrow, device=device)
        top_p = torch.tensor([[draws[row].sampling.top_p] for row in narrow], dtype=torch.float64, device=device)
        probabilities[index] = _nucleus(probabilities[index], top_p)
    # By the inverse of the distribution, in vocabulary order: the last bit of a logit, which depends on the size of
    # the batch, then moves the edges by a hair, where sampling from a sorted list could change every later draw.
    edges = probabilities.cumsum(1)
    numbers = torch.tensor([[own.number] for own in draws], dtype=torch.float64, device=device)
    found = torch.searchsorted(edges, numbers * edges[:, -1:], right=True).squeeze(1)
    # Rounding can take a draw to the upper edge itself: the last token that has a probability owns it.
    return found.minimum((edges < edges[:, -1:]).sum(1))


def _nucleus(probabilities: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Zero all but the smallest set of likeliest tokens that holds `top_p` float64[N, 1]; the likeliest stays."""
    ordered, ids = probabilities.sort(dim=1, descending=True, stable=True)
    kept = ordered.cumsum(1) - ordered < top_p
    return probabilities * torch.zeros_like(kept).scatter(1, ids, kept)
