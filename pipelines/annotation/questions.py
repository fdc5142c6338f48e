"""What is asked about a row: a prompt for all rows, or the question that the row brings along."""

from __future__ import annotations

from hashlib import blake2b

from pipelines.records import Message, Record, RowError

PROMPT_FIELDS = ("question", "id")
"""What may stand in braces in a prompt."""


def ask(record: Record, prompt: str | None) -> list[Message]:
    """The conversation to be answered; it ends with a question.

    Args:
        record: a row of the corpus.
        prompt: what to ask, with PROMPT_FIELDS in braces; None asks the row's conversation, up to its last question.

    Raises:
        RowError: no_question, where the row has none and needs one; no_image, where there is nothing to look at.
    """
    questions = [number for number, message in enumerate(record.messages) if message["role"] == "user"]
    own = record.messages[questions[-1]]["content"] if questions else ""
    if prompt is None:
        if not own.strip():
            raise RowError("no_question", "the row asks nothing; give a prompt", record.id)
        return record.messages[: questions[-1] + 1]
    needs_question = prompt.format(question="", id="") != prompt.format(question="\0", id="")
    if needs_question and not own.strip():
        raise RowError("no_question", "the prompt has {question}, and the row asks nothing", record.id)
    if record.image is None and not needs_question:
        raise RowError("no_image", "the prompt asks about an image, and the row has none", record.id)
    return [Message(role="user", content=prompt.format(question=own, id=record.id))]


def row_seed(seed: int, key: str) -> int:
    """The seed by which the row `key` draws its answer, whatever else is drawn with it."""
    return int.from_bytes(blake2b(f"{seed}:{key}".encode(), digest_size=7).digest(), "little")
