import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines.exit_status import terminate_as_interrupt
from pipelines.steps import (
    StepFailed,
    Steps,
    readable,
    run_command,
    sources_identity,
    started,
    stop_group,
)

APPEND = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"
DEAF = """
import signal, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
print(0, flush=True)
time.sleep(600)
"""
# Starts a deaf child, prints its id, and waits for it.
STUBBORN_PARENT = """
import signal, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""
TELL_PARENT_TO_STOP = """
import os, signal, sys, time
open(sys.argv[1], "w").write(str(os.getpid()))
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(600)
"""


def append(path: Path, text: str) -> list[str]:
    return [sys.executable, "-c", APPEND, str(path), text]


def alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def wait_until_gone(pid: int, patience_s: float = 10.0) -> None:
    deadline = time.monotonic() + patience_s
    while alive(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        os.sched_yield()


@contextmanager
def started_with_output(program: str) -> Iterator[tuple[subprocess.Popen, int]]:
    """A process in a group of its own that first prints a number."""
    argv = [sys.executable, "-c", program, DEAF]
    with subprocess.Popen(argv, start_new_session=True, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process, int(process.stdout.readline())
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


def test_a_finished_step_is_not_run_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for _ in range(2):
        steps = Steps(tmp_path / "receipts")
        steps.run("write", append(log, "x"), [log])
    assert log.read_text() == "x"
    assert [record.ran for record in steps.records] == [False]
    assert steps.records[0].seconds > 0


def test_a_changed_command_starts_without_the_old_output(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    Steps(tmp_path / "receipts").run("write", append(out / "log", "x"), [])
    steps = Steps(tmp_path / "receipts")
    steps.call("prepare", "make the folder", out.mkdir, [out])
    assert not (out / "log").exists() and steps.records[0].ran


def test_a_changed_step_runs_all_later_ones(tmp_path: Path) -> None:
    def run(first: str) -> list[bool]:
        steps = Steps(tmp_path / "receipts")
        steps.run("first", append(tmp_path / "first", first), [])
        steps.run("second", append(tmp_path / "second", "y"), [])
        return [record.ran for record in steps.records]

    assert [run("a"), run("a"), run("b"), run("b")] == [[True, True], [False, False], [True, True], [False, False]]


def test_a_changed_recipe_runs_its_step(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    ran = []
    for text in ("lr: 1", "lr: 1", "lr: 2"):
        recipe.write_text(text)
        steps = Steps(tmp_path / "receipts")
        steps.run("train", [sys.executable, "-c", "", "--config", str(recipe)], [])
        ran.append(steps.records[0].ran)
    assert ran == [True, False, True]


def test_other_code_runs_everything(tmp_path: Path) -> None:
    ran = []
    for code in ("old", "old", "new"):
        steps = Steps(tmp_path / "receipts", identity=code)
        steps.run("write", append(tmp_path / "log", "x"), [])
        ran.append(steps.records[0].ran)
    assert ran == [True, False, True]


def test_sources_identity_sees_every_python_file_but_the_excluded(tmp_path: Path) -> None:
    room = tmp_path / "room"
    (room / "report").mkdir(parents=True)
    for name in ("a.py", "notes.txt", "report/page.py"):
        (room / name).write_text("1")

    def identity() -> str:
        return sources_identity([room], without=[room / "report"])

    first = identity()
    (room / "notes.txt").write_text("2")
    (room / "report" / "page.py").write_text("2")
    assert identity() == first
    (room / "a.py").write_text("2")
    assert identity() != first
    second = identity()
    (room / "a.py").rename(room / "b.py")
    assert identity() != second


def test_missing_output_runs_its_step(tmp_path: Path) -> None:
    log = tmp_path / "log"
    for _ in range(2):
        steps = Steps(tmp_path / "receipts")
        steps.run("write", append(log, "x"), [log])
        assert steps.records[0].ran and log.read_text() == "x"
        log.unlink()


def test_a_step_that_was_cut_off_finds_what_it_left(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def work() -> None:
        out.mkdir(exist_ok=True)
        if not (out / "half").exists():
            (out / "half").touch()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Steps(tmp_path / "receipts").call("work", "work", work, [out])
    steps = Steps(tmp_path / "receipts")
    steps.call("work", "work", work, [out])
    assert steps.records[0].ran and (out / "half").exists()


def test_a_failed_command_is_no_finished_step(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "raise SystemExit(3)"]
    for _ in range(2):
        with pytest.raises(StepFailed, match="status 3 from: python -c"):
            Steps(tmp_path / "receipts").run("fail", argv, [])


def test_readable_command_can_be_typed() -> None:
    assert readable([sys.executable, "jobs/prepare.py", "--sources", '[{"a": 1}]']) == (
        """python jobs/prepare.py --sources '[{"a": 1}]'"""
    )


def test_leaving_the_block_stops_children_of_children() -> None:
    with started_with_output(STUBBORN_PARENT) as (process, grandchild):
        assert alive(grandchild)
        stop_group(process, patience_s=5.0)
    assert process.poll() is not None
    wait_until_gone(grandchild)


def test_a_deaf_process_is_killed() -> None:
    with started_with_output(DEAF) as (process, _):
        stop_group(process, patience_s=0.2)
    assert process.returncode == -signal.SIGKILL


def test_the_server_is_stopped_when_the_block_fails() -> None:
    sleeper = [sys.executable, "-c", "import time; time.sleep(600)"]
    with pytest.raises(RuntimeError, match="asked wrongly"), started(sleeper) as process:
        raise RuntimeError("asked wrongly")
    assert process.poll() is not None


def test_sigterm_stops_what_runs(tmp_path: Path) -> None:
    """A batch system's SIGTERM to the quickstart reaches the step that runs."""
    pid_file = tmp_path / "pid"
    before = signal.getsignal(signal.SIGTERM)  # Ray, started by another test, has a handler of its own
    with pytest.raises(KeyboardInterrupt), terminate_as_interrupt():
        run_command([sys.executable, "-c", TELL_PARENT_TO_STOP, str(pid_file)])
    wait_until_gone(int(pid_file.read_text()))
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_exit_by_which_ray_answers_sigterm_is_an_interrupt_and_no_other() -> None:
    with pytest.raises(KeyboardInterrupt), terminate_as_interrupt():
        sys.exit(int(signal.SIGTERM))
    with pytest.raises(SystemExit), terminate_as_interrupt():
        sys.exit(2)
