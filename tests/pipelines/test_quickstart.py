"""The quickstart's parts, without any job: tests/jobs/test_quickstart.py runs them all."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.quickstart import Quickstart, QuickstartSettings, job, recipe
from pipelines.report.contents import TypeScore


def test_commands_name_jobs_and_recipes_that_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("prepare", "train", "evaluate", "serve"):
        assert Path(job(name)[1]).is_file(), name
    for name in ("tiny-align", "tiny-instruct"):
        assert Path(recipe(name)[1]).is_file(), name


def test_goals_are_the_ones_asked_for(tmp_path: Path) -> None:
    quickstart = Quickstart(QuickstartSettings(out=str(tmp_path)))
    score = TypeScore("all", 100, accuracy=0.81, blank=0.57, majority=0.3)
    accuracy, gain = quickstart.goals(score)
    assert (accuracy.wanted, gain.wanted) == (80, 25)
    assert accuracy.is_met and not gain.is_met
    assert gain.measured == pytest.approx(24.0)
