"""Scratch folders: those of processes that were killed go, those that somebody uses stay."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.storage import scratch as scratch_folders
from pipelines.storage.scratch import new_scratch, remove_scratch, scratch

PATIENCE_S = 60
HOLD = """
import sys
from pathlib import Path
from pipelines.storage.scratch import new_scratch
folder = new_scratch("test", sys.argv[1] or None, Path(sys.argv[2]))
(folder / "file").write_bytes(b"x")
print(folder, flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def holder(parent: Path, word: str = "") -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A process that holds a scratch folder until it is killed, and the folder."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, word, str(parent)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            yield process, Path(process.stdout.readline().strip())
        finally:
            process.kill()


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait(PATIENCE_S)


def test_what_a_killed_process_left_goes_with_the_next_and_what_another_uses_stays(tmp_path: Path) -> None:
    (tmp_path / "flashsloth-scratch-test.txt").touch()
    (tmp_path / "other").mkdir()
    with holder(tmp_path) as (dying, left), holder(tmp_path) as (_, used):
        kill(dying)
        assert (left / "file").exists()
        mine = new_scratch("test", parent=tmp_path)
        assert not left.exists()
        assert (used / "file").exists()
        remove_scratch(mine)
        assert (used / "file").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"flashsloth-scratch-test.txt", "other", used.name}


def test_processes_that_name_one_word_share_a_folder_and_the_last_removes_it(tmp_path: Path) -> None:
    with holder(tmp_path, "word") as (other, shared):
        mine = new_scratch("test", "word", tmp_path)
        assert mine == shared
        remove_scratch(mine)
        assert (shared / "file").exists()
        assert new_scratch("test", "word", tmp_path) == shared
        kill(other)
        remove_scratch(new_scratch("else", parent=tmp_path))
        assert (shared / "file").exists()
        remove_scratch(mine)
        assert not shared.exists()


def test_one_that_is_swept_before_it_is_held_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hold, tries = scratch_folders._hold, []

    def slow(folder: Path) -> int | None:
        if len(tries) < 2:
            scratch_folders._sweep(tmp_path)
        tries.append(folder.exists())
        return hold(folder)

    monkeypatch.setattr(scratch_folders, "_hold", slow)
    folder = new_scratch("test", parent=tmp_path)
    assert (tries, folder.is_dir()) == ([False, False, True], True)
    remove_scratch(folder)


def test_a_block_leaves_nothing_and_a_folder_that_was_renamed_is_left_alone(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), scratch("test") as folder:
        (folder / "file").touch()
        raise ZeroDivisionError
    assert not folder.exists()
    part = new_scratch("test", parent=tmp_path)
    (part / "file").touch()
    part.rename(tmp_path / "whole")
    remove_scratch(part)
    remove_scratch(tmp_path / "whole")  # held by nobody
    assert [path.name for path in (tmp_path / "whole").iterdir()] == ["file"]
