"""`jobs/evaluate.py`, as it is called."""

from __future__ import annotations

import json

import pytest

from jobs.evaluate import main
from pipelines.evaluation.verdicts import read_answers
from pipelines.training.export import write_export
from pipelines.training.model_settings import ModelSettings
from pipelines.training.start import build_model, load_processor
from tests.prepared import coloured_rows, write_prepared


@pytest.fixture
def places(processor, tmp_path) -> dict[str, str]:
    processor.save_pretrained(tmp_path / "processor")
    settings = ModelSettings(preset="tiny", processor=str(tmp_path / "processor"))
    model = build_model(settings, load_processor(settings), "fp32", seed=4)
    write_export(str(tmp_path / "export"), model, model.state_dict(), processor, step=1)
    return {
        "checkpoint": str(tmp_path / "export"),
        "data": write_prepared(tmp_path / "split", coloured_rows(6, text_only_every=3, turns=2), processor),
        "output": str(tmp_path / "answers"),
    }


def flags(places: dict[str, str], *more: str) -> list[str]:
    return [*(word for name, value in places.items() for word in (f"--{name}", value)), "--max_new_tokens", "3", *more]


def test_it_writes_answers_and_a_summary(places, capsys):
    assert main(flags(places, "--majority_from", places["data"])) == 0
    answers = read_answers(places["output"])
    assert [(answer.id, answer.turn) for answer in answers] == [(str(i), turn) for i in range(6) for turn in range(2)]
    with open(f"{places['output']}/summary.json") as file:
        summary = json.load(file)
    assert summary["questions"] == 12 and summary["types"]["colour"]["majority_accuracy"] == pytest.approx(1 / 3)
    assert summary["majority_from"] == places["data"] and summary["blank_images"] is False
    printed = capsys.readouterr().out
    assert "answered 12/12 questions" in printed and "overall" in printed


@pytest.mark.ray
def test_an_actor_pool_gives_the_same_answers(ray_session, places):
    assert main(flags(places)) == 0
    here = read_answers(places["output"])
    assert main(flags(places, "--num_workers", "2", "--batch_size", "4")) == 0
    assert read_answers(places["output"]) == here


@pytest.mark.parametrize(
    ("field", "words"),
    [("checkpoint", "nowhere: there is no such checkpoint folder"), ("data", "nowhere: no manifest.json here")],
)
def test_wrong_places_end_with_a_clear_error(places, tmp_path, capsys, field, words):
    assert main(flags(places | {field: str(tmp_path / "nowhere")})) == 1
    assert f"error: {tmp_path}/{words}" in capsys.readouterr().err


def test_features_of_another_tower_are_refused(places, processor, tmp_path, capsys):
    foreign = write_prepared(tmp_path / "features", coloured_rows(4), processor, payload="features")
    assert main(flags(places | {"data": foreign})) == 1
    assert f"error: {foreign} holds features of the tower test" in capsys.readouterr().err
