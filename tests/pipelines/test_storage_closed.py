"""Folders that may not be read, as somebody who is not root meets them."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

_NOBODY = 65534
_LOOK = """
import os, sys
from pipelines import storage
if os.getuid() == 0:
    os.setuid(int(sys.argv[2]))
try:
    print(list(storage.match(sys.argv[1])))
except OSError as error:
    print(error)
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    """Open to everybody, as pytest's are not, with two files, one of them in a closed folder."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        for place in ("open", "closed"):
            (root / place).mkdir()
            (root / place / "1.jpg").touch()
        root.chmod(0o755)
        (root / "closed").chmod(0)
        yield root
        (root / "closed").chmod(0o755)


def look(pattern: str) -> str:
    """What somebody else is told of `pattern`."""
    command = [sys.executable, "-c", _LOOK, pattern, str(_NOBODY)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


@pytest.mark.parametrize("pattern", ["*/*.jpg", "*/1.jpg", "**/*.jpg", "closed/*.jpg", "clo*/*"])
def test_a_folder_that_may_not_be_read_is_named(folder: Path, pattern: str) -> None:
    answer = look(f"{folder}/{pattern}")
    assert "Permission denied" in answer
    assert str(folder) in answer


def test_one_beside_the_pattern_is_of_no_matter(folder: Path) -> None:
    assert look(f"{folder}/o*/*.jpg") == "['open/1.jpg']"
