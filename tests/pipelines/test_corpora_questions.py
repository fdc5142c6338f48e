"""Rows of VQA sets -> records, in JSON and in Parquet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.formats import error, read_rows, records

ROWS = [
    {"id": "1", "image": "a.jpg", "question": "<image>\nWhat is it?", "answer": "An <image>."},
    {"id": "2", "image": "a.jpg", "question": "How many?", "answer": None},
    {"id": "", "image": None, "question": "", "answer": ""},
]


def check(found: list[Any]) -> None:
    first, second, third = records(found)
    assert first.messages == [
        {"role": "user", "content": "What is it?"},
        {"role": "assistant", "content": "An <image>."},
    ]
    assert (second.id, second.image, second.messages) == ("2", "a.jpg", [{"role": "user", "content": "How many?"}])
    assert (third.image, [message["content"] for message in third.messages]) == (None, ["", ""])


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ROWS))
    check(read_rows("questions", path))


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "questions.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    check(read_rows("parquet", path))


def test_turns_go_before_a_question_beside_them(tmp_path: Path) -> None:
    path = tmp_path / "both.parquet"
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    pq.write_table(pa.Table.from_pylist([{"messages": turns, "question": "other"}]), path)
    [record] = records(read_rows("parquet", path))
    assert record.messages == turns


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ({"id": "r"}, "'question' is text, this is missing or null"),
        ({"id": "r", "question": ["Q"]}, "'question' is text, this is a list"),
        ({"id": "r", "question": "Q", "answer": 5}, "'answer' is text, this is a number"),
        ({"id": "r", "question": "Q\0"}, "'question' contains a NUL character"),
        ({"id": "r", "question": "Q", "image_path": "a.jpg"}, "the row has 'image_path' and no 'image', which alone"),
        ({"id": "r", "question": "Q", "img": {"path": "a.jpg"}}, "the row has 'img' and no 'image', which alone"),
    ],
)
def test_what_is_refused(tmp_path: Path, row: dict[str, Any], detail: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(row))
    [found] = read_rows("questions", path)
    assert (error(found).reason, error(found).id) == ("row_malformed", "r")
    assert detail in error(found).detail


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        ({"image": "a.jpg", "question": "<image> or <image>?"}, "2 <image> for 1 image(s)"),
        ({"question": "<image>\nWhat is it?"}, "1 <image> for 0 image(s)"),
    ],
)
def test_more_markers_than_images(tmp_path: Path, row: dict[str, Any], detail: str) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text(json.dumps(row))
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "questions.parquet")
    for found in (*read_rows("questions", path), *read_rows("parquet", tmp_path / "questions.parquet")):
        assert (error(found).reason, error(found).detail) == ("image_marker_mismatch", detail)
