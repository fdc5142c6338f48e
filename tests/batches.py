"""What tests of the continuous batch share: who remembers answers, and steps until all have come."""

from __future__ import annotations

from collections.abc import Sequence

from pipelines.serving.answers import Answer, Chunk
from pipelines.serving.batch import ContinuousBatch
from pipelines.serving.prompts import Prompt
from pipelines.serving.tickets import Ticket


class Sender:
    """Remembers what came for a ticket."""

    def __init__(self, ticket: Ticket) -> None:
        self.ticket = ticket
        self.chunks: list[Chunk] = []
        ticket.set_listener(self.chunks.append)

    @property
    def ended(self) -> bool:
        return bool(self.chunks) and self.chunks[-1].finish_reason is not None

    @property
    def answer(self) -> Answer:
        assert [chunk.finish_reason for chunk in self.chunks[:-1]] == [None] * (len(self.chunks) - 1)
        return Answer.join(self.chunks)


def run(batch: ContinuousBatch, prompts: Sequence[Prompt]) -> list[Answer]:
    senders = [Sender(batch.submit(prompt)) for prompt in prompts]
    for _ in range(1000):
        if not batch.busy:
            return [sender.answer for sender in senders]
        batch.step()
    raise AssertionError(f"still busy after 1000 steps: {batch.stats()}")
