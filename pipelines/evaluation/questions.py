"""The questions of a prepared split: every user turn of every row."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pipelines.shards.reader import ShardedDataset

UNTYPED = "all"


class EvaluationError(ValueError):
    """A checkpoint and a prepared split do not go together; the message names both."""


@dataclass(frozen=True)
class Question:
    """One user turn of one row."""

    row: int
    turn: int
    """From 0."""
    question_type: str
    truth: str
    num_tokens: int
    """Of the row up to this question, roughly; questions are batched by it."""


def read_questions(dataset: ShardedDataset, rows: Iterable[int] | None = None) -> list[Question]:
    """Every user turn of the split, in order; of `rows` alone where given.

    Raises:
        EvaluationError: The split is in the caption layout, which has no questions, or holds no row.
    """
    if dataset.manifest.layout != "chat":
        raise EvaluationError(
            f"{dataset.folder} is in layout '{dataset.manifest.layout}', which has no questions; prepare it as 'chat'"
        )
    questions = []
    for index in range(len(dataset)) if rows is None else rows:
        row = dataset.read(index)
        messages, types = row["messages"], row["question_types"]
        for turn in range(len(messages) // 2):
            # Where the question's answer ends is not stored; the share of turns is near enough to sort by.
            length = len(row["input_ids"]) * (turn + 1) // max(1, len(messages) // 2)
            kind = types[turn] if types else UNTYPED
            questions.append(Question(index, turn, kind, messages[2 * turn + 1]["content"].strip(), length))
    if not questions:
        raise EvaluationError(f"{dataset.folder} holds no question")
    return questions
