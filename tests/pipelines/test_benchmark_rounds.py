"""Tests for pipelines/benchmarks/rounds.py, table.py, machine.py and photos.py: the frame of every benchmark."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines.benchmarks.machine import describe_machine
from pipelines.benchmarks.photos import draw_photo, write_rows
from pipelines.benchmarks.rounds import Rounds, Spread, take_turns
from pipelines.benchmarks.table import Bound, Report, Table


def test_contestants_take_turns_and_the_order_turns_round() -> None:
    order: list[str] = []

    def contestant(name: str) -> dict[str, float]:
        order.append(name)
        return {"seconds": len(order)}

    rounds = take_turns({"a": lambda: contestant("a"), "b": lambda: contestant("b")}, rounds=3)
    assert "".join(order) == "abbaab"
    assert [each["a"]["seconds"] for each in rounds.figures] == [1, 4, 5]
    assert len(rounds.loads) == 3


def test_a_ratio_is_taken_within_a_round() -> None:
    """The machine was twice as slow in the second round and ten times in the third: the ratio does not care."""
    rounds = Rounds([{"a": {"s": 2.0 * slow}, "b": {"s": 1.0 * slow}} for slow in (1, 2, 10)], [0.0] * 3)
    assert rounds.ratio("a", "b", "s") == Spread(2.0, 2.0, 2.0)
    assert rounds.spread("a", "s") == Spread(4.0, 2.0, 20.0)
    assert json.loads(json.dumps(rounds.record()))["rounds"][1]["a"]["s"] == 4.0


def test_what_is_said_names_round_contestant_and_figures() -> None:
    said: list[str] = []
    take_turns({"a": lambda: {"rows_per_s": 1234.5678}}, rounds=1, say=said.append)
    assert said == ["round 1 of 1: a: rows_per_s 1,235"]


@pytest.mark.parametrize(
    ("sense", "wanted", "measured", "is_met"),
    [("at least", 0.85, 0.85, True), ("at least", 0.85, 0.849, False), ("at most", 1.15, 1.16, False)],
)
def test_a_bound_is_met_or_not(sense: str, wanted: float, measured: float, is_met: bool) -> None:
    bound = Bound(name="prepare", sense=sense, wanted=wanted, measured=measured)  # type: ignore[arg-type]
    assert bound.is_met is is_met
    assert bound.text().startswith("met: " if is_met else "NOT MET: ")


def test_a_report_is_markdown_and_json(tmp_path: Path) -> None:
    table = Table(title="Speed", columns=["who", "rows/s"], rows=[["a", "1,000"], ["longer", "2"]], notes=["A note."])
    assert table.text().splitlines()[2:6] == [
        "| who    | rows/s |",
        "| ------ | -----: |",
        "| a      |  1,000 |",
        "| longer |      2 |",
    ]
    bound = Bound(name="a of b", sense="at least", wanted=1, measured=2)
    machine = describe_machine()
    report = Report(name="x", machine=machine, settings={"n": 1}, tables=[table], bounds=[bound], measured={"r": [1]})
    path = report.save(str(tmp_path / "new"))
    assert Report.model_validate_json(path.read_text()) == report
    assert "met: a of b: 2 (at least 1 wanted)" in report.text()
    assert f"{machine.cores} cores" in report.text() and "torch 2." in report.text()


def test_photos_are_drawn_again_alike_and_weigh_what_photos_do() -> None:
    first, again, other = draw_photo(0, 3), draw_photo(0, 3), draw_photo(0, 4)
    assert first == again != other
    for photo in (first, other):
        assert 25_000 < len(photo) < 110_000
        image = Image.open(io.BytesIO(photo))
        assert {side // 50 for side in image.size} <= {7, 8, 9, 10}
        assert np.asarray(image).std() > 20  # not one colour


def test_rows_can_outnumber_photos(tmp_path: Path) -> None:
    path = write_rows(tmp_path, num_rows=5, num_photos=2)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["image"] for row in rows] == [f"images/{number}.jpg" for number in (0, 1, 0, 1, 0)]
    assert all(row["conversations"][0]["value"].startswith("<image>\n") for row in rows)
    assert len({row["conversations"][1]["value"] for row in rows}) == 5
