"""ShareGPT rows -> records: names of speakers, the system text, and LLaVA's rules for the image."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.formats import error, read_rows, records


def turns(*texts: str, names: tuple[str, str] = ("human", "gpt")) -> list[dict[str, str]]:
    return [{"from": names[i % 2], "value": value} for i, value in enumerate(texts)]


def write(folder: Path, *rows: Any) -> Path:
    path = folder / "corpus.json"
    path.write_text(json.dumps(rows))
    return path


@pytest.mark.parametrize("names", [("human", "gpt"), ("user", "assistant"), ("human", "chatgpt"), ("human", "bard")])
def test_names_of_speakers(tmp_path: Path, names: tuple[str, str]) -> None:
    rows = [{"id": "x_0", "conversations": turns("Q", "A", names=names)}, {"conversations": turns("Q", "A", "Q", "A")}]
    first, second = records(read_rows("sharegpt", write(tmp_path, *rows)))
    assert [message["role"] for message in first.messages] == ["user", "assistant"]
    assert (first.id, second.id, len(second.messages)) == ("x_0", "", 4)


def test_the_system_text_stands_first_and_an_empty_one_is_none(tmp_path: Path) -> None:
    rows = [{"system": system, "conversations": turns("Q", "A")} for system in ("Be brief.", "", None)]
    first, *others = records(read_rows("sharegpt", write(tmp_path, *rows)))
    assert first.messages[0] == {"role": "system", "content": "Be brief."}
    assert all(len(other.messages) == 2 for other in others)


def test_tools_that_a_row_offers_are_refused_and_none_are_nothing(tmp_path: Path) -> None:
    rows = [{"tools": tools, "conversations": turns("Q", "A")} for tools in ('[{"name": "f"}]', "", "[]", [], None)]
    refused, *others = read_rows("sharegpt", write(tmp_path, *rows))
    assert error(refused).reason == "row_malformed" and "tools" in error(refused).detail
    assert len(records(others)) == 4


def test_of_two_conversations_none_is_lost_in_silence(tmp_path: Path) -> None:
    other = {
        "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "B"}],
        "texts": [{"user": "Q", "assistant": "B"}],
    }
    rows: list[Any] = [{"conversations": turns("Q", "A"), field: value} for field, value in other.items()]
    rows += [{"conversations": turns("Q", "A"), field: value} for field in other for value in ([], None, ["EXIT", "2"])]
    read = read_rows("sharegpt", write(tmp_path, *rows))
    for field, refused in zip(other, read[: len(other)], strict=True):
        assert (error(refused).reason, field in error(refused).detail) == ("row_malformed", True)
    assert len(records(read[len(other) :])) == len(rows) - len(other)


def test_the_image_and_its_marker(tmp_path: Path) -> None:
    rows = [{"images": ["a.jpg"], "conversations": turns("<image>Q", "A")}, {"conversations": turns("<image>Q", "A")}]
    first, second = read_rows("sharegpt", write(tmp_path, *rows))
    [record] = records([first])
    assert (record.image, record.messages[0]["content"]) == ("a.jpg", "Q")
    assert error(second).reason == "image_marker_mismatch"


@pytest.mark.parametrize("field", ["video", "videos", "audio", "audios"])
def test_a_row_about_a_video_or_a_sound_is_no_row_of_text(tmp_path: Path, field: str) -> None:
    asked = {"id": "r", "conversations": turns(f"<{field}>Q", "A")}
    held: list[Any] = ["a.mp4", ["a.mp4"], {"bytes": None, "path": "a.mp4"}]
    rows = [asked | {field: value} for value in (*held, None, [], "", {"bytes": None, "path": None})]
    read = read_rows("sharegpt", write(tmp_path, *rows))
    refused = [error(row) for row in read[: len(held)]]
    assert [(each.reason, each.id) for each in refused] == [("media_not_supported", "r")] * len(held)
    assert refused[0].detail == f"the row has '{field}'; FlashSloth looks at an image"
    assert all(each.image is None for each in records(read[len(held) :]))


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"system": 5}, "'system' is text, this is a number"),
        ({"system": "\0"}, "NUL"),
        ({"conversations": [{"from": "tool", "value": "x"}]}, "from 'tool'"),
        ({"conversations": [{"value": "x"}]}, "turn 0 has no 'from'; it has: 'value'"),
        ({"conversations": [{"role": "user", "content": "x"}]}, "turn 0 has no 'from'; it has: 'role', 'content'"),
        ({"conversations": [{"\ud800": "x"}]}, r"turn 0 has no 'from'; it has: '\ud800'"),
        ({"conversations": [{"from": "\ud800", "value": "x"}]}, r"turn 0 is from '\ud800'"),
        ({"conversations": "x"}, "a list of turns"),
        ({"conversations": [*turns("Q"), {"from": "gpt", "value": "A", "weight": 0}]}, "turn 1 has weight 0"),
        ({"conversations": [*turns("Q"), {"from": "gpt", "value": "A", "tool_calls": [1]}]}, "turn 1 has tool_calls"),
    ],
)
def test_what_is_refused(tmp_path: Path, change: dict[str, Any], detail: str) -> None:
    [row] = read_rows("sharegpt", write(tmp_path, {"id": "r", "conversations": turns("Q", "A")} | change))
    found = error(row)
    assert (found.reason, found.id) == ("row_malformed", "r")
    assert detail in found.detail
