"""Answers beside the truth: which are right, how many of each type, and the files that say so."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from pipelines import storage
from pipelines.evaluation.questions import Question
from pipelines.shards.reader import ShardedDataset

ANSWERS_NAME = "answers.jsonl"
SUMMARY_NAME = "summary.json"


@dataclass(frozen=True)
class AnsweredQuestion:
    """A line of answers.jsonl."""

    key: str
    id: str
    turn: int
    question: str
    type: str
    answer: str
    truth: str
    correct: bool


def judge(
    dataset: ShardedDataset, questions: Sequence[Question], answers: Iterable[dict[str, Any]]
) -> list[AnsweredQuestion]:
    """Answers beside the truth, in the order of the questions."""
    given = {(answer["row"], answer["turn"]): answer["answer"] for answer in answers}
    judged = []
    for question in questions:
        row = dataset.read(question.row)
        answer = given[question.row, question.turn]
        judged.append(
            AnsweredQuestion(
                key=row["key"],
                id=row["id"],
                turn=question.turn,
                question=row["messages"][2 * question.turn]["content"],
                type=question.question_type,
                answer=answer,
                truth=question.truth,
                correct=answer.strip() == question.truth,
            )
        )
    return judged


def majority_answers(questions: Iterable[Question]) -> dict[str, str]:
    """The most frequent true answer of each question type; of equally frequent ones the first in the alphabet."""
    counted: dict[str, Counter[str]] = defaultdict(Counter)
    for question in questions:
        counted[question.question_type][question.truth] += 1
    return {
        kind: min(counter.items(), key=lambda item: (-item[1], item[0]))[0] for kind, counter in sorted(counted.items())
    }


def summarize(answers: Sequence[AnsweredQuestion], majority: dict[str, str]) -> dict[str, Any]:
    """Counts and shares (0 to 1), overall and per question type."""
    by_type: dict[str, list[AnsweredQuestion]] = defaultdict(list)
    for answer in answers:
        by_type[answer.type].append(answer)
    types = {kind: _score(group, majority) | {"majority_answer": majority.get(kind)} for kind, group in by_type.items()}
    return _score(answers, majority) | {"types": dict(sorted(types.items()))}


def _score(answers: Sequence[AnsweredQuestion], majority: dict[str, str]) -> dict[str, Any]:
    return {
        "questions": len(answers),
        "accuracy": sum(answer.correct for answer in answers) / len(answers),
        "majority_accuracy": sum(answer.truth == majority.get(answer.type) for answer in answers) / len(answers),
    }


def write_evaluation(output: str, answers: Sequence[AnsweredQuestion], summary: dict[str, Any]) -> None:
    """Write answers.jsonl, then summary.json, so that a summary vouches for the answers."""
    lines = "".join(json.dumps(asdict(answer), ensure_ascii=False) + "\n" for answer in answers)
    storage.write_bytes(storage.join(output, ANSWERS_NAME), lines.encode())
    storage.write_bytes(storage.join(output, SUMMARY_NAME), json.dumps(summary, indent=1, ensure_ascii=False).encode())


def read_answers(output: str) -> list[AnsweredQuestion]:
    """The answers that an evaluation wrote into `output`, in the order of the questions."""
    text = storage.read_bytes(storage.join(output, ANSWERS_NAME)).decode()
    return [AnsweredQuestion(**json.loads(line)) for line in text.split("\n") if line]
