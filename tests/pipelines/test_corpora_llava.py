"""LLaVA rows -> records: where the marker goes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.corpora import llava
from pipelines.corpora.spans import group
from pipelines.records import Record, Row, RowError


def read(tmp_path: Path, *rows: Any) -> list[Row]:
    path = tmp_path / "corpus.json"
    path.write_text(json.dumps(rows))
    return [row for span in group(llava.scan(str(path)), 2) for row in llava.read(str(path), span)]


def record(tmp_path: Path, row: Any) -> Record:
    [read_row] = read(tmp_path, row)
    assert isinstance(read_row.content, Record), read_row.content
    return read_row.content


def error(tmp_path: Path, row: Any) -> RowError:
    [read_row] = read(tmp_path, row)
    assert isinstance(read_row.content, RowError), read_row.content
    return read_row.content


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("question", ["<image>\nHow many dogs?", "How many dogs?\n<image>", "<image> How many dogs? "])
def test_marker_is_taken_out_wherever_it_stands(tmp_path: Path, question: str) -> None:
    row = {"id": "g1", "image": "a/2.jpg", "conversations": turns(question, "Two", "Brown?", "Yes")}
    assert record(tmp_path, row) == Record(
        messages=[
            {"role": "user", "content": "How many dogs?"},
            {"role": "assistant", "content": "Two"},
            {"role": "user", "content": "Brown?"},
            {"role": "assistant", "content": "Yes"},
        ],
        id="g1",
        image="a/2.jpg",
    )


def test_text_only_row_is_left_as_it_is(tmp_path: Path) -> None:
    found = record(tmp_path, {"conversations": turns(" Write a haiku. ", "Soft rain\n")})
    assert found.image is None
    assert found.id == ""
    assert [message["content"] for message in found.messages] == [" Write a haiku. ", "Soft rain\n"]


@pytest.mark.parametrize("empty", [None, "", []])
def test_an_empty_field_is_as_if_it_were_not_there(tmp_path: Path, empty: Any) -> None:
    for field, other in (("image", "images"), ("images", "image")):
        assert record(tmp_path, {field: empty, "conversations": turns("Q", "A")}).image is None
        row = {field: empty, other: ["a.jpg"], "conversations": turns("<image>Q", "A")}
        assert record(tmp_path, row).image == "a.jpg"


def test_answer_may_spell_the_marker(tmp_path: Path) -> None:
    found = record(tmp_path, {"conversations": turns("What stands for a picture?", "<image>")})
    assert found.messages[1]["content"] == "<image>"


def test_other_names_of_roles_number_ids_and_question_types(tmp_path: Path) -> None:
    conversation = [{"from": "user", "value": "<image>\nQ"}, {"from": "assistant", "value": "A"}]
    row = {"id": 7, "image": ["a.jpg"], "conversations": conversation, "question_types": ["colour"]}
    found = record(tmp_path, row)
    assert [message["role"] for message in found.messages] == ["user", "assistant"]
    assert (found.id, found.image, found.question_types) == ("7", "a.jpg", ["colour"])


@pytest.mark.parametrize(("own", "text"), [(1.0, "1"), (-3.0, "-3"), (2**60, str(2**60)), ("1.5", "1.5")])
def test_ids_that_are_whole_numbers(tmp_path: Path, own: Any, text: str) -> None:
    assert record(tmp_path, {"id": own, "conversations": turns("Q", "A")}).id == text


@pytest.mark.parametrize(
    ("own", "found"), [(1.5, "1.5"), (float("nan"), "nan"), (float("inf"), "inf"), (True, "a truth value")]
)
def test_ids_that_are_none(tmp_path: Path, own: Any, found: str) -> None:
    refused = error(tmp_path, {"id": own, "conversations": turns("Q", "A")})
    assert refused.detail == f"'id' is text or a whole number, this is {found}"


def test_positions_run_through_the_file(tmp_path: Path) -> None:
    rows = read(tmp_path, *({"id": str(i), "conversations": turns("Q", "A")} for i in range(5)))
    assert [row.position for row in rows] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        ({"image": None}, "image_marker_mismatch", "1 <image> for 0 image"),
        ({"conversations": turns("Q", "A")}, "image_marker_mismatch", "0 <image> for 1 image"),
        ({"conversations": turns("<image> <image> Q", "A")}, "image_marker_mismatch", "2 <image> for 1 image"),
        ({"conversations": turns("Q", "A", "<image> Q", "A")}, "image_marker_misplaced", "question 2"),
        ({"image": ["a.jpg", "b.jpg"]}, "too_many_images", "2 images"),
        ({"image": ""}, "image_marker_mismatch", "1 <image> for 0 image"),
        ({"image": [""]}, "row_malformed", "'image' is a path, this is an empty text"),
        ({"images": ["b.jpg"]}, "row_malformed", "not both"),
        ({"image": 3}, "row_malformed", "a number"),
        ({"image": {"bytes": ""}}, "row_malformed", "an object"),
        ({"conversations": []}, "row_malformed", "empty list"),
        ({"conversations": None}, "row_malformed", "missing or null"),
        ({"conversations": ["Q"]}, "row_malformed", "turn 0"),
        ({"conversations": [{"from": "robot", "value": "Q"}]}, "row_malformed", "'robot'"),
        ({"conversations": [{"from": ["human"], "value": "Q"}]}, "row_malformed", "turn 0"),
        ({"conversations": [{"from": "human", "value": 5}]}, "row_malformed", "turn 0"),
        ({"conversations": turns("<image> \0", "A")}, "row_malformed", "NUL"),
        ({"conversations": turns("<image> \ud800", "A")}, "row_malformed", "surrogate"),
        ({"id": True}, "row_malformed", "'id'"),
        ({"question_types": ["colour", "shape"]}, "row_malformed", "2 question_types for 1 user turns"),
        ({"question_types": "colour"}, "row_malformed", "question_types"),
    ],
)
def test_what_is_refused(tmp_path: Path, change: dict[str, Any], reason: str, detail: str) -> None:
    row = {"id": "r", "image": "a.jpg", "conversations": turns("<image>\nQ", "A")} | change
    found = error(tmp_path, row)
    assert found.reason == reason
    assert detail in found.detail
    assert found.id == ("" if "id" in change else "r")


@pytest.mark.parametrize("row", [None, 3, "row", ["row"], []])
def test_row_of_another_type(tmp_path: Path, row: Any) -> None:
    assert error(tmp_path, row).reason == "row_malformed"


def test_bad_row_between_good_ones(tmp_path: Path) -> None:
    good = {"id": "good", "conversations": turns("Q", "A")}
    contents = [row.content for row in read(tmp_path, good, {"id": "bad"}, good)]
    assert [isinstance(content, Record) for content in contents] == [True, False, True]
