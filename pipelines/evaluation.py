"""How often a checkpoint answers a prepared split exactly right, per question type.

    prepared rows -> questions (each with the true earlier turns before it) -> batches of similar length
    -> greedy answers -> answers.jsonl and summary.json

An answer is right where it equals the truth, both stripped of surrounding space. The majority baseline gives every
question the most frequent true answer of its type: counted in the evaluated split itself, which flatters the baseline,
or in a training split where one is named. A blank image is a uniform grey of 127 in place of every picture.
"""

from __future__ import annotations

import json
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import ray
import torch

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.collation import collate
from flashsloth.image_processing_flashsloth import GREY, normalize_pixels
from pipelines import storage
from pipelines.feed import model_inputs
from pipelines.shards.reader import ShardedDataset
from pipelines.training.export import fetch_export, load_export

ANSWERS_NAME = "answers.jsonl"
SUMMARY_NAME = "summary.json"
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


class Answerer:
    """A model that answers questions of a prepared split.

    Args:
        model: In evaluation mode, on the device where it shall work.
        processor: The one that prepared the split.
        dataset: The split.
        blank_images: Show grey in place of every picture.
        max_new_tokens: Longest answer.
    """

    def __init__(
        self,
        model: FlashSlothForConditionalGeneration,
        processor: FlashSlothProcessor,
        dataset: ShardedDataset,
        blank_images: bool = False,
        max_new_tokens: int = 64,
    ) -> None:
        self._model = model
        self._processor = processor
        self._dataset = dataset
        self._blank_images = blank_images
        self._max_new_tokens = max_new_tokens

    @torch.inference_mode()
    def answer(self, questions: Sequence[tuple[int, int]]) -> list[str]:
        """Greedy answers to `(row, turn)` pairs, in one batch padded on the left."""
        rows = {row: self._dataset.read(row) for row, _ in questions}
        batch = collate(
            [self._prompt(rows[row], turn) for row, turn in questions], self._processor.pad_token_id, "left"
        )
        inputs = {name: tensor.to(self._model.device) for name, tensor in batch.items()}
        if "pixel_values" in inputs:
            inputs["pixel_values"] = normalize_pixels(inputs["pixel_values"])
        generated = self._model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=self._max_new_tokens,
            eos_token_id=self._processor.eos_token_id,
            pad_token_id=self._processor.pad_token_id,
        )
        return self._processor.post_process(generated[:, inputs["input_ids"].shape[1] :])

    def _prompt(self, row: dict[str, Any], turn: int) -> dict[str, Any]:
        """The conversation up to question `turn`, and the image, as a sample for `collate`."""
        stored = model_inputs(row, self._processor)
        image = {name: stored[name] for name in ("pixel_values", "patch_features") if name in stored}
        if image and self._blank_images:
            image = {"pixel_values": _grey(self._processor)}
        prompt = self._processor.encode(row["messages"][: 2 * turn + 1], has_image=bool(image))
        return {"input_ids": prompt["input_ids"], "question_ids": prompt["question_ids"], **image}


class CheckpointAnswerer(Answerer):
    """A checkpoint that answers questions of a prepared split. Also the class of a Ray Data actor pool.

    Args:
        checkpoint: `from_pretrained` folder, local or on an object store.
        folder: The prepared split.
        blank_images: Show grey in place of every picture.
        max_new_tokens: Longest answer.
        num_threads: CPU threads of torch; as many as it likes where None.
        cache_dir: Where shards of an object store are kept.

    Raises:
        EvaluationError: The split was prepared by another processor than the checkpoint's.
        ExportError: There is no such checkpoint.
    """

    def __init__(
        self,
        checkpoint: str,
        folder: str,
        blank_images: bool = False,
        max_new_tokens: int = 64,
        num_threads: int | None = None,
        cache_dir: str | None = None,
    ) -> None:
        if num_threads:
            torch.set_num_threads(num_threads)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        dataset = ShardedDataset(folder, cache_dir=cache_dir)
        processor = check_processor(checkpoint, dataset)
        model = load_export(checkpoint, dtype).eval().to(device)
        super().__init__(model, processor, dataset, blank_images, max_new_tokens)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """`row` int64[B] and `turn` int64[B] to the same and `answer`, for Ray Data."""
        answers = self.answer([(int(row), int(turn)) for row, turn in zip(batch["row"], batch["turn"], strict=True)])
        return {"row": batch["row"], "turn": batch["turn"], "answer": np.array(answers, dtype=object)}


def check_processor(checkpoint: str, dataset: ShardedDataset) -> FlashSlothProcessor:
    """The checkpoint's processor, which must be the one that prepared the split."""
    processor = FlashSlothProcessor.from_pretrained(fetch_export(checkpoint))
    prepared, own = dataset.manifest.processor_identity, processor.identity()
    if prepared != own:
        raise EvaluationError(
            f"{dataset.folder} was prepared by processor {prepared[:12]}, the one of {checkpoint} is {own[:12]}: "
            "prepare the split with the processor of this checkpoint"
        )
    return processor


def answer_here(answerer: Answerer, questions: Sequence[Question], batch_size: int) -> Iterator[dict[str, Any]]:
    """Answer in this process; yields `{row, turn, answer}`, a batch of similar lengths at a time."""
    ordered = sorted(questions, key=lambda question: question.num_tokens)
    for start in range(0, len(ordered), batch_size):
        pairs = [(question.row, question.turn) for question in ordered[start : start + batch_size]]
        for (row, turn), answer in zip(pairs, answerer.answer(pairs), strict=True):
            yield {"row": row, "turn": turn, "answer": answer}


def answer_on_ray(
    questions: Sequence[Question],
    batch_size: int,
    num_workers: int,
    cpus_per_worker: float,
    gpus_per_worker: float,
    answerer_arguments: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Answer with a pool of `CheckpointAnswerer` actors on the connected cluster; yields as `answer_here` does."""
    ordered = sorted(questions, key=lambda question: question.num_tokens)
    table = ray.data.from_items([{"row": question.row, "turn": question.turn} for question in ordered])
    answered = table.map_batches(
        CheckpointAnswerer,
        fn_constructor_kwargs={**answerer_arguments, "num_threads": max(1, int(cpus_per_worker))},
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        batch_size=batch_size,
        num_cpus=cpus_per_worker,
        num_gpus=gpus_per_worker,
    )
    yield from answered.iter_rows()


def with_progress(answers: Iterable[dict[str, Any]], total: int, every_s: float = 5.0) -> Iterator[dict[str, Any]]:
    """Pass `answers` through, and say how far they are every few seconds."""
    started = said = time.monotonic()
    for count, answer in enumerate(answers, start=1):
        yield answer
        now = time.monotonic()
        if now - said >= every_s or count == total:
            said = now
            print(f"answered {count}/{total} questions ({count / (now - started):.0f}/s)", flush=True)


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


def _grey(processor: FlashSlothProcessor) -> np.ndarray:
    images = processor.image_processor
    return np.full((images.num_tiles, 3, images.size, images.size), GREY[0], dtype=np.uint8)
