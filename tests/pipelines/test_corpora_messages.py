"""Chat messages -> records: every way to say where the image is, and what is refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.records import Record, RowError
from tests.formats import error, read_rows, records

ANSWER = {"role": "assistant", "content": "Two"}
ASKED: list[dict[str, str]] = [{"role": "user", "content": "How many dogs?"}, {"role": "assistant", "content": "Two"}]
DATA_URI = "data:image/png;base64," + base64.b64encode(b"\x89PNG, bytes").decode()


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "corpus.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def only(folder: Path, row: Any) -> Record:
    [record] = records(read_rows("messages", write(folder, row)))
    return record


def refused(folder: Path, row: Any) -> RowError:
    [read] = read_rows("messages", write(folder, row))
    return error(read)


def asked(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """A row whose question has these parts."""
    return {"id": "r", "messages": [{"role": "user", "content": list(parts)}, ANSWER], **fields}


def text(value: str = "How many dogs?") -> dict[str, str]:
    return {"type": "text", "text": value}


@pytest.mark.parametrize(
    ("row", "image"),
    [
        (asked(text()), None),
        (asked({"type": "image_url", "image_url": {"url": DATA_URI}}, text()), b"\x89PNG, bytes"),
        (asked(text(), {"type": "image_url", "image_url": {"url": "a/1.jpg", "detail": "low"}}), "a/1.jpg"),
        (asked({"type": "image_url", "image_url": "a/1.jpg"}, text()), "a/1.jpg"),
        (asked({"type": "image", "image": "a/1.jpg"}, text()), "a/1.jpg"),
        (asked({"type": "image", "url": DATA_URI}, text()), b"\x89PNG, bytes"),
        (asked({"type": "image", "path": "a/1.jpg"}, text()), "a/1.jpg"),
        (asked({"type": "image"}, text(), image="a/1.jpg"), "a/1.jpg"),
        (asked({"type": "image"}, text(), images=["a/1.jpg"]), "a/1.jpg"),
        (asked({"type": "image"}, text(), image="a/1.jpg", images=[]), "a/1.jpg"),
        (asked({"type": "image"}, text(), images=[DATA_URI]), b"\x89PNG, bytes"),
        ({"id": "r", "messages": [{"role": "user", "content": "<image>\nHow many dogs?"}, ANSWER], "image": "a"}, "a"),
        (
            {
                "id": "r",
                "messages": [
                    {"role": "user", "content": "<image>\nHow many dogs?"},
                    {"role": "assistant", "content": [text("Two")]},
                ],
                "image": "a.jpg",
            },
            "a.jpg",
        ),
    ],
)
def test_every_way_to_name_the_image(tmp_path: Path, row: Any, image: str | bytes | None) -> None:
    assert only(tmp_path, row) == Record(messages=ASKED, id="r", image=image)  # type: ignore[arg-type]


def test_the_system_text_of_a_row_stands_first(tmp_path: Path) -> None:
    [record] = records(read_rows("messages", write(tmp_path, {"messages": [*ASKED, ANSWER], "system": "Be brief."})))
    assert record.messages[0] == {"role": "system", "content": "Be brief."}


def test_weights_that_change_nothing_are_taken(tmp_path: Path) -> None:
    question, unweighed = ASKED[0], {"weight": 0}
    turns = [question | unweighed, ANSWER | {"weight": 1, "tool_calls": None}, question | {"tool_calls": []}, ANSWER]
    assert only(tmp_path, {"messages": turns}).messages == [*ASKED, *ASKED]


def test_texts_of_a_message_are_joined_and_spell_the_marker_freely(tmp_path: Path) -> None:
    found = only(tmp_path, asked(text("Look:"), {"type": "image", "image": "a.jpg"}, text("what does <image> mean?")))
    assert found.messages[0]["content"] == "Look:\nwhat does <image> mean?"


@pytest.mark.parametrize(
    "texts", [["<image>\nHow many dogs?"], ["How many dogs? <image> "], ["<image>", "How many dogs?"]]
)
def test_a_marker_that_repeats_an_image_part_is_taken_out(tmp_path: Path, texts: list[str]) -> None:
    parts = [{"type": "image", "image": "a.jpg"}, *map(text, texts)]
    for row in (asked(*parts), asked(*reversed(parts))):
        assert only(tmp_path, row).messages == ASKED


def test_several_turns_and_a_system_text(tmp_path: Path) -> None:
    system = {"role": "system", "content": "Be brief."}
    question = {"role": "user", "content": [text("Brown?")]}
    answer = {"role": "assistant", "content": [text("Yes")]}
    row = {"messages": [system, *asked({"type": "image", "image": "a.jpg"}, text())["messages"], question, answer]}
    found = only(tmp_path, row)
    assert [message["role"] for message in found.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert [message["content"] for message in found.messages][3:] == ["Brown?", "Yes"]
    assert (found.id, found.image) == ("", "a.jpg")


@pytest.mark.parametrize(
    ("row", "reason", "detail"),
    [
        (
            {"messages": [{"role": "user", "content": "<image> Q"}, {"role": "assistant", "content": [text("A")]}]},
            *("image_marker_mismatch", "1 image parts without an address for 0 image(s)"),
        ),
        (
            {"messages": [ASKED[0], ANSWER | {"function_call": {"name": "f"}}]},
            "row_malformed",
            "turn 1 has function_call",
        ),
        ({"messages": [ASKED[0], ANSWER | {"weight": 0}]}, "row_malformed", "turn 1 has weight 0, but every answer"),
        ({"messages": [ASKED[0], ANSWER | {"tool_calls": [{"id": "1"}]}]}, "row_malformed", "turn 1 has tool_calls"),
        (asked(text(), videos=["a.mp4"]), "media_not_supported", "the row has 'videos'"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "row_malformed", "from 'tool'; known: user, assistant"),
        ({"messages": [{"role": "user", "content": None}]}, "row_malformed", "'content' is text or a list of parts"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "row_malformed", "'content' is text or a list of parts"),
        ({"messages": "hello"}, "row_malformed", "'messages' is a list of turns, this is text"),
        ({"conversations": []}, "row_malformed", "'messages' is a list of turns, this is missing"),
        (asked({"type": "video", "video": "a.mp4"}), "row_malformed", "a part of type 'video'"),
        (asked({"type": "text", "text": 5}), "row_malformed", "a part of type 'text'"),
        (asked({"type": "image_url", "image_url": {}}), "row_malformed", "'image' is a path, this is missing"),
        (asked(*[{"type": "image", "image": "a.jpg"}] * 2), "too_many_images", "2 images"),
        (asked({"type": "image"}, text()), "image_marker_mismatch", "1 image parts without an address for 0 image"),
        (asked(text(), image="a.jpg"), "image_marker_mismatch", "0 image parts without an address for 1 image"),
        (asked(text(), image="a.jpg", images=["b.jpg"]), "row_malformed", "not both"),
        (
            {"messages": [*ASKED, {"role": "user", "content": [{"type": "image", "image": "a"}]}, ANSWER]},
            "image_marker_misplaced",
            "turn 2",
        ),
        ({"messages": ASKED, "image": "a.jpg"}, "image_marker_mismatch", "0 <image> for 1 image"),
        (asked(text("<image>\nQ")), "image_marker_mismatch", "turn 0: 1 <image> in its texts beside 0 image part(s)"),
        (asked(text("<image>\nQ"), image="a.jpg"), "image_marker_mismatch", "1 <image> in its texts beside 0 image"),
        (
            asked({"type": "image", "image": "a.jpg"}, text("<image>"), text("Q <image>")),
            *("image_marker_mismatch", "turn 0: 2 <image> in its texts beside 1 image part(s)"),
        ),
        (
            {"messages": [*ASKED, {"role": "user", "content": [text("<image>Q")]}, ANSWER]},
            *("image_marker_mismatch", "turn 2: 1 <image> in its texts"),
        ),
        (asked({"type": "image", "url": "data:image/png,x"}), "image_undecodable", "must be base64"),
        (asked({"type": "image", "url": "data:image/png;base64,x!"}), "image_undecodable", "not base64"),
        (asked({"type": "image", "url": "data:image/png;base64,é"}), "image_undecodable", "not base64"),
        (asked({"type": "image", "url": "a\0.jpg"}), "row_malformed", "NUL"),
    ],
)
def test_what_is_refused(tmp_path: Path, row: Any, reason: str, detail: str) -> None:
    found = refused(tmp_path, row)
    assert (found.reason, found.id) == (reason, row.get("id", ""))
    assert detail in found.detail
