"""Evaluation: questions from rows, greedy batches, exact match, baselines."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from flashsloth import FlashSlothProcessor
from flashsloth.image_processing_flashsloth import normalize_pixels
from pipelines.evaluation.answering import CheckpointAnswerer, answer_here, check_processor
from pipelines.evaluation.questions import EvaluationError, Question, read_questions
from pipelines.evaluation.verdicts import (
    AnsweredQuestion,
    judge,
    majority_answers,
    read_answers,
    summarize,
    write_evaluation,
)
from pipelines.shards.reader import ShardedDataset
from pipelines.training.export import load_export, write_export
from pipelines.training.model_settings import ModelSettings
from pipelines.training.start import build_model, load_processor
from tests.prepared import coloured_rows, write_prepared


@pytest.fixture
def checkpoint(processor, tmp_path) -> str:
    """An untrained model: it answers nonsense, but always the same nonsense."""
    processor.save_pretrained(tmp_path / "processor")
    settings = ModelSettings(preset="tiny", processor=str(tmp_path / "processor"))
    model = build_model(settings, load_processor(settings), "fp32", seed=4)
    with torch.no_grad():  # untrained query paths are so faint that a picture would change no answer
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.mul_(8 if "language_model" not in name else 3)
    write_export(str(tmp_path / "export"), model, model.state_dict(), processor, step=1)
    return str(tmp_path / "export")


@pytest.fixture
def folder(processor, tmp_path) -> str:
    rows = coloured_rows(9, text_only_every=3, turns=3)
    for row in rows:
        row["question_types"] = ["colour", "again", "again"]
    return write_prepared(tmp_path / "split", rows, processor)


def one_by_one(checkpoint: str, folder: str, questions: list[Question], blank: bool = False) -> list[str]:
    """The slow obvious twin: each question alone, through the processor's own call, with the true history."""
    model, processor = load_export(checkpoint, torch.float32).eval(), FlashSlothProcessor.from_pretrained(checkpoint)
    dataset, answers = ShardedDataset(folder), []
    for question in questions:
        row = dataset.read(question.row)
        prompt = processor.encode(row["messages"][: 2 * question.turn + 1], has_image="pixel_values" in row)
        inputs = {name: torch.tensor([prompt[name]]) for name in ("input_ids", "question_ids")}
        if "pixel_values" in row:
            pixels = np.full_like(row["pixel_values"], 127) if blank else row["pixel_values"]
            inputs["pixel_values"] = normalize_pixels(torch.tensor(pixels))[None]
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=6, eos_token_id=processor.eos_token_id)
        answers.append(processor.post_process(ids[:, inputs["input_ids"].shape[1] :])[0])
    return answers


def test_every_user_turn_is_a_question_with_its_type_and_truth(folder):
    questions = read_questions(ShardedDataset(folder))
    assert len(questions) == 27
    assert [(q.row, q.turn, q.question_type, q.truth) for q in questions[:4]] == [
        (0, 0, "colour", "red"),
        (0, 1, "again", "red"),
        (0, 2, "again", "red"),
        (1, 0, "colour", "green"),
    ]
    assert len(read_questions(ShardedDataset(folder), rows=range(2))) == 6


def test_rows_without_types_count_as_one_type(processor, tmp_path):
    rows = [row | {"question_types": []} for row in coloured_rows(2)]
    questions = read_questions(ShardedDataset(write_prepared(tmp_path / "plain", rows, processor)))
    assert {question.question_type for question in questions} == {"all"}


@pytest.mark.parametrize("blank", [False, True])
def test_batched_answers_are_those_of_each_question_alone(checkpoint, folder, blank):
    questions = read_questions(ShardedDataset(folder))
    answerer = CheckpointAnswerer(checkpoint, folder, blank_images=blank, max_new_tokens=6)
    given = {(a["row"], a["turn"]): a["answer"] for a in answer_here(answerer, questions, batch_size=5)}
    assert [given[q.row, q.turn] for q in questions] == one_by_one(checkpoint, folder, questions, blank)


def test_a_blank_image_takes_the_picture_away(checkpoint, folder):
    seen, blank = (
        CheckpointAnswerer(checkpoint, folder, blank_images=blank, max_new_tokens=6) for blank in (False, True)
    )
    pictures = [(row, 0) for row in (0, 1, 3, 4)]  # four rows, four colours, otherwise alike
    assert len(set(seen.answer(pictures))) > 1
    same_words = [(0, 0), (3, 0), (6, 0)]
    assert len(set(blank.answer(same_words))) == 1
    assert blank.answer([(2, 0)]) == seen.answer([(2, 0)])  # no picture, nothing to take away


def test_all_payloads_can_be_evaluated(checkpoint, processor, tmp_path):
    rows = coloured_rows(4)
    folders = {
        kind: write_prepared(tmp_path / kind, rows, processor, payload=kind)
        for kind in ("pixels", "original", "features")
    }
    pairs = [(row, 0) for row in range(4)]
    answers = {
        kind: CheckpointAnswerer(checkpoint, folder, max_new_tokens=4).answer(pairs) for kind, folder in folders.items()
    }
    assert answers["pixels"] == answers["original"]
    assert len(answers["features"]) == 4
    blank = {kind: CheckpointAnswerer(checkpoint, folder, True, 4).answer(pairs) for kind, folder in folders.items()}
    assert blank["pixels"] == blank["features"]


def test_the_majority_baseline_is_the_most_frequent_answer_of_a_type():
    truths = {"colour": ["red", "blue", "blue"], "count": ["2", "1"]}
    questions = [Question(0, 0, kind, truth, 10) for kind, group in truths.items() for truth in group]
    assert majority_answers(questions) == {"colour": "blue", "count": "1"}


def test_a_summary_counts_per_type_and_overall(folder):
    dataset = ShardedDataset(folder)
    questions = read_questions(dataset, rows=range(2))
    answers = [{"row": q.row, "turn": q.turn, "answer": " red "} for q in reversed(questions)]
    judged = judge(dataset, questions, answers)
    assert [answer.correct for answer in judged] == [True] * 3 + [False] * 3
    assert (judged[1].key, judged[1].turn, judged[1].question) == ("test:0", 1, "What color is the square? now")
    summary = summarize(judged, {"colour": "green", "again": "red"})
    assert (summary["questions"], summary["accuracy"], summary["majority_accuracy"]) == (6, 0.5, 0.5)
    assert summary["types"]["colour"] == {
        "questions": 2,
        "accuracy": 0.5,
        "majority_accuracy": 0.5,
        "majority_answer": "green",
    }


def test_what_is_written_can_be_read(tmp_path):
    answers = [AnsweredQuestion("k", "7", 0, "Which?", "colour", "rot\u00fc", "red", False)]
    write_evaluation(str(tmp_path / "out"), answers, {"accuracy": 0.0})
    assert read_answers(str(tmp_path / "out")) == answers
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == {"accuracy": 0.0}
    assert "rot\u00fc" in (tmp_path / "out" / "answers.jsonl").read_text()


def test_captions_and_foreign_splits_are_refused_by_name(checkpoint, processor, tokenizer, tmp_path):
    captions = write_prepared(tmp_path / "captions", coloured_rows(1), processor, layout="caption")
    with pytest.raises(EvaluationError, match=r"captions is in layout 'caption'"):
        read_questions(ShardedDataset(captions))
    other = FlashSlothProcessor(processor.image_processor, tokenizer, num_image_tokens=9, query_separator="")
    foreign = write_prepared(tmp_path / "foreign", coloured_rows(1), other)
    with pytest.raises(EvaluationError, match=f"{other.identity()[:12]}.*{processor.identity()[:12]}"):
        check_processor(checkpoint, ShardedDataset(foreign))
    empty = write_prepared(tmp_path / "empty", [], processor)
    with pytest.raises(EvaluationError, match="holds no question"):
        read_questions(ShardedDataset(empty))
