"""The quickstart in small: every step runs with the real jobs, too briefly to learn anything."""

import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobs.quickstart import main

ROOT = Path(__file__).resolve().parents[2]
STEPS = [
    "draw",
    "prepare captions",
    "prepare instruct",
    "prepare heldout",
    "align",
    "tune",
    "evaluate pictures",
    "evaluate blank",
    "serve and ask",
]
SMALL = ["--scenes", "48", "--heldout_scenes", "10", "--align.max_steps", "2", "--instruct.max_steps", "2"]
SMALL += ["--gallery", "3", "--pictures_asked", "1"]
MARK = "FLASHSLOTH_QUICKSTART_TEST"


class Runs:
    """Runs of the quickstart in one folder. All their processes carry a mark, so that none can hide."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.mark = uuid.uuid4().hex

    def start(self, *flags: str) -> subprocess.Popen:
        argv = [sys.executable, "jobs/quickstart.py", "--out", str(self.out), *SMALL, *flags]
        environment = {**os.environ, MARK: self.mark, "PYTHONUNBUFFERED": "1"}
        environment.pop("RAY_ADDRESS", None)
        return subprocess.Popen(
            argv, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def finish(self, *flags: str) -> tuple[int, str]:
        process = self.start(*flags)
        output, _ = process.communicate()
        return process.returncode, output

    def processes(self) -> list[str]:
        """Command lines of all living processes that carry the mark."""
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and f"{MARK}={self.mark}".encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue  # it ended while we looked, or is a zombie
        return found

    def wait_until_none_is_left(self) -> None:
        deadline = time.monotonic() + 30
        while left := self.processes():
            assert time.monotonic() < deadline, left
            os.sched_yield()


@pytest.fixture
def runs(tmp_path: Path) -> Iterator[Runs]:
    runs = Runs(tmp_path / "quickstart")
    yield runs
    runs.wait_until_none_is_left()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_interrupted_then_finished_then_repeated(runs: Runs) -> None:
    process = runs.start()
    for line in process.stdout:
        if line.startswith("ray: joined"):  # the first job runs
            break
    assert runs.processes(), "the mark is inherited"
    process.send_signal(signal.SIGINT)
    assert "run the same command again" in process.communicate()[0]
    assert process.returncode == 130
    runs.wait_until_none_is_left()

    status, output = runs.finish("--wanted_accuracy", "0", "--wanted_gain", "-100")
    assert status == 0, output
    assert "[draw] done before" in output, "what was finished before the interrupt is not done again"
    commands = [line for line in output.splitlines() if line.startswith("[")]
    assert [line[1 : line.index("]")] for line in commands] == STEPS
    page = (runs.out / "report.html").read_text("utf-8")
    assert "Asked over HTTP" in page and "manifest" in page
    assert page.count("<svg") == 2 and page.count("data:image/jpeg") >= 4

    status, output = runs.finish("--wanted_accuracy", "100", "--wanted_gain", "100")
    assert status == 1, output
    assert output.count("done before") == len(STEPS)
    assert output.count("NOT MET") == 2
    assert "not met: at least 100 wanted" in (runs.out / "report.html").read_text("utf-8")


def test_a_misspelt_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--scense", "10"])
    assert stopped.value.code == 2
    assert "scense" in capsys.readouterr().err


def test_a_failing_step_ends_the_run_with_its_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A vocabulary without room for the bytes: the tokenizer cannot be trained."""
    out = tmp_path / "quickstart"
    assert main(["--out", str(out), "--scenes", "3", "--heldout_scenes", "1", "--vocab_size", "100"]) == 1
    assert "error: vocab_size 100 is too small" in capfd.readouterr().err
    assert not (out / "report.html").exists()
