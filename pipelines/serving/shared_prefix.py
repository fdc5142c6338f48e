"""The text that prompts begin with, such as the system prompt: read once, and copied into the slots that need it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from pipelines.serving.prompts import Prompt
from pipelines.serving.slots import Slots


class SharedPrefix:
    """Keys and values of the opening that the last prompts had in common.

    An opening ends before the first question: EmbQ reads a turn's question, and looks at its image, where its query
    tokens are read, so these three stay together. Nothing after it changes it, for no position looks ahead.

    Args:
        slots: where prompts are read.
        placeholders: tokens that no opening holds: an image's, a query's.
    """

    def __init__(self, slots: Slots, placeholders: Sequence[int]) -> None:
        self._slots = slots
        self._placeholders = frozenset(placeholders)
        self._tokens: list[int] = []
        self._states = slots.states[:, :, 0, :, :0]

    def place(self, prompts: Sequence[Prompt], slot: int) -> int:
        """Fill the slots from `slot` on, as far as all prompts begin as what is kept; returns how many positions."""
        length = _common([self._tokens, *map(self._opening, prompts)])
        if length:
            rows = slice(slot, slot + len(prompts))
            self._slots.states[:, :, rows, :, :length] = self._states[:, :, None, :, :length]
        return length

    def keep(self, prompts: Sequence[Prompt], slot: int) -> None:
        """Remember the opening of prompts that were read into the slots from `slot` on, unless it is known."""
        openings = [self._opening(prompt) for prompt in prompts]
        length = _common(openings)
        if length <= _common([self._tokens, *openings]):
            return
        states = self._slots.states[:, :, slot, :, :length]
        if bool(states.isfinite().all()):  # or all that comes would be as broken as this prompt was
            self._tokens, self._states = openings[0][:length], states.clone()

    def _opening(self, prompt: Prompt) -> list[int]:
        # The last token is always read: it is the one that is answered.
        tokens = zip(prompt.input_ids[:-1], prompt.question_ids, strict=False)
        return [token for token, turn in takewhile(lambda one: not one[1] and one[0] not in self._placeholders, tokens)]


def _common(texts: Sequence[list[int]]) -> int:
    """How many first tokens all have in common."""
    columns = zip(*texts, strict=False)
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, columns))
