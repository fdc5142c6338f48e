"""Evaluation of a run's checkpoints: the same figures as the exported model's, however the run was spread out."""

from __future__ import annotations

import json
import os
import shutil
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from flashsloth import FlashSlothImageProcessor, FlashSlothProcessor
from flashsloth.image_processing_flashsloth import normalize_pixels
from pipelines import storage
from pipelines.evaluation.answering import CheckpointAnswerer, answer_here
from pipelines.evaluation.questions import read_questions
from pipelines.evaluation.verdicts import judge
from pipelines.feed import model_inputs
from pipelines.shards.reader import ShardedDataset
from pipelines.training import remote_evaluator
from pipelines.training.checkpoint import CheckpointError, stored_names
from pipelines.training.evaluator import CheckpointEvaluator, check_split, spread
from pipelines.training.export import load_export
from pipelines.training.keeper import EvaluationFailed
from pipelines.training.launch import ResourceError, check_cluster, train
from pipelines.training.remote_evaluator import EvaluatorProcess, RemoteEvaluator
from pipelines.training.scores import Score, read_best, read_score, read_scores
from pipelines.training.settings import TrainSettings
from pipelines.training.start import StartError
from tests.prepared import coloured_rows, write_prepared
from tests.training import losses, recipe, write_data
from tests.training_ranks import train_on

CPU = torch.device("cpu")
LORA = {"rank": 4, "alpha": 8}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data of `write_data`, and a split of eleven rows of which some have no image and some two turns."""
    root = write_data(tmp_path_factory.mktemp("prepared"))
    processor = FlashSlothProcessor.from_pretrained(root / "processor")
    write_prepared(root / "split", coloured_rows(7, text_only_every=3), processor)
    write_prepared(root / "more", coloured_rows(4, turns=2), processor)
    return root


def evaluated(prepared: Path, where: Path | str, **changes: Any) -> TrainSettings:
    """`recipe`, whose checkpoints of steps 2, 4 and 6 are evaluated."""
    section = {"folders": [f"{prepared}/split", f"{prepared}/more"], "cpus": 1, "gpus": 0, "max_new_tokens": 4}
    given = {name.removeprefix("evaluation__"): value for name, value in changes.items() if "evaluation" in name}
    others = {name: value for name, value in changes.items() if "evaluation" not in name}
    return recipe(prepared, where, evaluation=section | given, deepspeed__stage=3, **others)


@pytest.fixture(scope="module")
def trained(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have trained with ZeRO-3, and keep every checkpoint, since no Ray is there to remove them."""
    where = tmp_path_factory.mktemp("trained")
    train_on(2, evaluated(prepared, where), where / "logs")
    return where


def evaluator(settings: TrainSettings) -> CheckpointEvaluator:
    return CheckpointEvaluator(settings, f"{settings.run.storage}/{settings.run.name}", CPU)


def newest(settings: TrainSettings) -> str:
    return stored_names(f"{settings.run.storage}/{settings.run.name}")[0]


def loss_row_by_row(export: str, folders: list[str]) -> float:
    """The slow obvious twin: every row alone through the exported model, then the mean over all loss tokens."""
    model, processor = load_export(export, torch.float32).eval(), FlashSlothProcessor.from_pretrained(export)
    total = tokens = 0.0
    for folder in folders:
        dataset = ShardedDataset(folder)
        for index in range(len(dataset)):
            sample = model_inputs(dataset.read(index), processor)
            inputs = {
                name: torch.tensor(np.asarray(sample[name]))[None].long()
                for name in ("input_ids", "labels", "question_ids")
            }
            if "pixel_values" in sample:
                inputs["pixel_values"] = normalize_pixels(torch.tensor(sample["pixel_values"]))[None]
            with torch.no_grad():
                total += float(model(**inputs, num_items_in_batch=1.0).loss)
            tokens += int((inputs["labels"] != -100).sum())
    return total / tokens


def test_the_loss_is_that_of_the_exported_model_row_by_row(prepared: Path, trained: Path) -> None:
    settings = evaluated(prepared, trained)
    assert settings.evaluation
    name = newest(settings)
    score = evaluator(settings).evaluate(name)
    assert (score.step, score.rows, score.exact_match) == (6, 11, None)
    expected = loss_row_by_row(f"{trained}/run/export", settings.evaluation.folders)
    assert score.loss == pytest.approx(expected, rel=1e-5)
    assert read_score(f"{trained}/run", name) == score


def test_the_loss_depends_neither_on_the_micro_batch_nor_on_the_number_of_workers(
    prepared: Path, trained: Path, tmp_path: Path
) -> None:
    def loss(**changes: Any) -> float:
        settings = evaluated(prepared, trained, **changes)
        return evaluator(settings).evaluate(newest(settings)).loss

    one = loss(batch__micro_size=1)
    micro_batches: list[dict[str, int]] = [{"micro_size": 4}, {"max_tokens": 300}, {"max_tokens": 600, "pack_to": 300}]
    for micro_batch in micro_batches:
        assert loss(batch={"global_size": 8, **micro_batch}) == pytest.approx(one, rel=1e-5)

    alone = evaluated(prepared, tmp_path)
    train_on(1, alone, tmp_path / "logs", at_step=2)
    first = stored_names(f"{trained}/run")[-1]
    by_two = evaluator(evaluated(prepared, trained)).evaluate(first)
    assert evaluator(alone).evaluate(newest(alone)).loss == pytest.approx(by_two.loss, rel=1e-5)


def test_exact_match_is_what_the_exported_model_answers(prepared: Path, trained: Path) -> None:
    settings = evaluated(prepared, trained, evaluation__metric="exact_match")
    score = evaluator(settings).evaluate(newest(settings))
    right = 0
    for folder in (f"{prepared}/split", f"{prepared}/more"):
        answerer = CheckpointAnswerer(f"{trained}/run/export", folder, max_new_tokens=4)
        dataset = ShardedDataset(folder)
        questions = read_questions(dataset)
        right += sum(answer.correct for answer in judge(dataset, questions, answer_here(answerer, questions, 3)))
    assert score.questions == 15 and score.exact_match == right / 15 and score.value == score.exact_match


def test_the_rows_are_spread_evenly_over_all_folders(prepared: Path, trained: Path) -> None:
    settings = evaluated(prepared, trained, evaluation__max_rows=4)
    assert evaluator(settings).evaluate(newest(settings)).rows == 4
    assert spread(11, 4).tolist() == [0, 2, 5, 8] and spread(3, 9).tolist() == [0, 1, 2]


def test_a_checkpoint_can_be_exported(prepared: Path, trained: Path, tmp_path: Path) -> None:
    settings = evaluated(prepared, trained)
    evaluator(settings).export(newest(settings), str(tmp_path / "best"))
    exported, run = (load_file(folder / "model.safetensors") for folder in (tmp_path / "best", trained / "run/export"))
    assert exported.keys() == run.keys()
    assert all(torch.equal(exported[name], run[name]) for name in run)


def test_a_run_with_adapters_is_evaluated_with_them(prepared: Path, tmp_path: Path) -> None:
    settings = evaluated(prepared, tmp_path, lora=LORA, max_steps=2)
    assert settings.evaluation
    train_on(1, settings, tmp_path / "logs")
    examined = evaluator(settings)
    score = examined.evaluate(newest(settings))
    expected = loss_row_by_row(f"{tmp_path}/run/export", settings.evaluation.folders)
    assert score.loss == pytest.approx(expected, rel=1e-5)
    examined.export(newest(settings), str(tmp_path / "best"))
    assert load_export(str(tmp_path / "best"), torch.float32)


def test_a_damaged_checkpoint_has_no_score(prepared: Path, trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run", tmp_path / "run")
    settings = evaluated(prepared, tmp_path)
    victim = sorted((tmp_path / "run" / newest(settings)).glob("*.safetensors"))[1]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    with pytest.raises(CheckpointError, match=rf"{newest(settings)}: {victim.name} has sha256 \S+ \S+ was written"):
        evaluator(settings).evaluate(newest(settings))


@pytest.mark.s3
def test_checkpoints_on_s3_are_fetched_verified_and_scored(prepared: Path, trained: Path, s3_uri: str) -> None:
    local = evaluated(prepared, trained)
    name = newest(local)
    for path in (trained / "run" / name).iterdir():
        storage.write_bytes(f"{s3_uri}/run/{name}/{path.name}", path.read_bytes())
    remote = evaluated(prepared, s3_uri)
    score, expected = evaluator(remote).evaluate(name), evaluator(local).evaluate(name)
    assert score.loss == expected.loss and score.manifest == expected.manifest
    assert read_score(f"{s3_uri}/run", name) == score
    storage.write_bytes(f"{s3_uri}/run/{name}/rank-00001-of-00002.safetensors", b"short")
    with pytest.raises(CheckpointError, match=r"rank-00001-of-00002\.safetensors has 5 bytes"):
        evaluator(remote).evaluate(name)


def test_a_split_that_does_not_fit_is_named_at_the_start(prepared: Path, tmp_path: Path) -> None:
    tokenizer = FlashSlothProcessor.from_pretrained(prepared / "processor").tokenizer
    other = FlashSlothProcessor(FlashSlothImageProcessor(size=126), tokenizer, num_image_tokens=9, num_query_tokens=4)
    foreign = write_prepared(tmp_path / "foreign", coloured_rows(2), other)
    with pytest.raises(StartError, match=f"{foreign} was prepared by processor"):
        check_split(evaluated(prepared, tmp_path, evaluation__folders=[foreign]))
    own = FlashSlothProcessor.from_pretrained(prepared / "processor")
    captions = write_prepared(tmp_path / "captions", coloured_rows(2), own, layout="caption")
    check_split(evaluated(prepared, tmp_path, evaluation__folders=[captions]))
    with pytest.raises(StartError, match=f"exact_match asks questions, and {captions} is in layout 'caption'"):
        check_split(evaluated(prepared, tmp_path, evaluation__folders=[captions], evaluation__metric="exact_match"))
    with pytest.raises(ValidationError, match=r"evaluation\.every 3 is not a multiple of run.checkpoint_every 2"):
        evaluated(prepared, tmp_path, evaluation__every=3)


class DyingProcess(EvaluatorProcess):
    """Is killed in its first evaluation of the run."""

    def evaluate(self, checkpoint: str) -> Score:
        killed = Path(self._run_uri) / "killed"
        if not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().evaluate(checkpoint)


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_run_evaluates_its_checkpoints_although_the_evaluator_is_killed(
    ray_session: None,
    prepared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    greedy = evaluated(prepared, tmp_path, evaluation__cpus=8)
    with pytest.raises(
        ResourceError, match=r"2 workers with 1 CPU each and 8 for evaluation.cpus, 10 in all; .* 4 CPU"
    ):
        check_cluster(greedy.scaling, greedy.evaluation)
    # One worker: what matters here is what stands beside it.
    settings = evaluated(prepared, tmp_path, scaling__num_workers=1)
    undisturbed = evaluated(prepared, tmp_path / "undisturbed", scaling__num_workers=1)
    train_on(1, undisturbed, tmp_path / "logs")
    monkeypatch.setattr(remote_evaluator, "EvaluatorProcess", DyingProcess)
    train(settings)
    said = capsys.readouterr().out
    assert "the evaluator died over step-00000002" in said and "starting another one, attempt 2 of 3" in said
    assert losses(settings) == losses(undisturbed)  # training has not noticed

    run = f"{tmp_path}/run"
    scores = read_scores(run)
    assert [score.step for score in scores] == [2, 4, 6]
    lines = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    logged = {line["checkpoint"]: line["evaluation"] for line in lines if "evaluation" in line}
    assert logged == {score.checkpoint: score.figures for score in scores}
    plain = evaluator(undisturbed)
    for score, name in zip(scores, reversed(stored_names(f"{tmp_path}/undisturbed/run")), strict=True):
        assert score.loss == plain.evaluate(name).loss
    best = read_best(run)
    lowest = min(scores, key=lambda score: score.loss)
    assert best and (best.step, best.checkpoint) == (lowest.step, lowest.checkpoint)
    assert {best.checkpoint, *(score.checkpoint for score in scores[-2:])} == set(stored_names(run))
    assert best.model and load_export(f"{run}/{best.model}", torch.float32)


class RefusingProcess(EvaluatorProcess):
    """Finds every checkpoint damaged."""

    def evaluate(self, checkpoint: str) -> Score:
        raise CheckpointError(f"{checkpoint}: damaged")


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_an_evaluator_that_cannot_work_says_why(
    ray_session: None, prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    homeless = RemoteEvaluator(evaluated(prepared, tmp_path, evaluation__cpus=64, evaluation__timeout_s=0.3), "run")
    assert not homeless.start(timeout_s=0.3)
    with pytest.raises(EvaluationFailed, match=r"not been done with step-1 after 0\.3 s \(evaluation\.timeout_s\), or"):
        homeless.evaluate("step-1")

    patient = RemoteEvaluator(evaluated(prepared, tmp_path, evaluation__cpus=64), "run")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(patient.evaluate, "step-1")
        patient.close()
        with pytest.raises(EvaluationFailed, match="the run has ended before"):
            waiting.result(60)

    monkeypatch.setattr(remote_evaluator, "EvaluatorProcess", RefusingProcess)
    refusing = RemoteEvaluator(evaluated(prepared, tmp_path), "run")
    with pytest.raises(EvaluationFailed, match=r"^step-1: damaged$"):
        refusing.evaluate("step-1")
    refusing.close()
