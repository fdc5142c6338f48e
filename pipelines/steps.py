"""Commands run one after another, each once: timed, remembered in a receipt, and stopped with everything they started.

A step that finished is not run again while its command, the recipes that it names and all steps before it are the same.
One that was cut off is run again on what it left behind, since jobs continue where they stopped; one that has changed
starts without its old output.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

# How long children get to end by themselves, per signal: Ray takes a few seconds to take its processes down.
PATIENCE_S = 20.0


class StepFailed(RuntimeError):
    """A step's command ended with an error; its own message stands above."""


@dataclass(frozen=True)
class StepRecord:
    """A finished step: what ran, and how long it took when it did."""

    name: str
    command: str
    seconds: float
    ran: bool
    """False where an earlier run had finished it."""


class Steps:
    """Runs steps in order and keeps their receipts in `folder`.

    `identity` stands for what all steps depend on beside their commands, such as the code: with another one, none
    counts as finished. `before_command` is called before each command that has to run: what it starts, no run needs
    that finds everything finished.
    """

    def __init__(self, folder: Path, identity: str = "", before_command: Callable[[], None] = lambda: None) -> None:
        self._folder = folder
        self._identity = identity
        self._before_command = before_command
        self.records: list[StepRecord] = []

    def run(self, name: str, argv: Sequence[str], outputs: Sequence[Path]) -> None:
        """Run a command in a process of its own.

        Args:
            name: of the step and of its receipt.
            argv: the command; files after `--config` belong to its identity.
            outputs: files and folders that it writes, removed before it runs where it is not the same step as before.

        Raises:
            StepFailed: where it does not end with status 0.
        """
        recipes = [Path(path).read_text("utf-8") for flag, path in itertools.pairwise(argv) if flag == "--config"]

        def work() -> None:
            self._before_command()
            run_command(argv)

        self._once(name, readable(argv), recipes, outputs, work)

    def call(self, name: str, label: str, work: Callable[[], object], outputs: Sequence[Path]) -> None:
        """Do some work in this process, under the same rules; `label` stands for its command."""
        self._once(name, label, [], outputs, work)

    def _once(
        self, name: str, label: str, recipes: Sequence[str], outputs: Sequence[Path], work: Callable[[], object]
    ) -> None:
        self._identity = hashlib.sha256(json.dumps([self._identity, name, label, *recipes]).encode()).hexdigest()
        path = self._folder / f"{name.replace(' ', '-')}.json"
        receipt = json.loads(path.read_text("utf-8")) if path.exists() else {}
        if receipt.get("identity") != self._identity:
            for output in outputs:
                _remove(output)
        elif receipt["seconds"] is not None and all(output.exists() for output in outputs):
            print(f"\n[{name}] done before, in {receipt['seconds']:.1f} s: {label}", flush=True)
            self.records.append(StepRecord(name, label, receipt["seconds"], ran=False))
            return
        self._write(path, seconds=None)
        print(f"\n[{name}] {label}", flush=True)
        started = time.monotonic()
        work()
        seconds = time.monotonic() - started
        self._write(path, seconds)
        self.records.append(StepRecord(name, label, seconds, ran=True))

    def _write(self, path: Path, seconds: float | None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps({"identity": self._identity, "seconds": seconds}), "utf-8")
        partial.replace(path)


def _remove(output: Path) -> None:
    if output.is_dir():
        shutil.rmtree(output)
    else:
        output.unlink(missing_ok=True)


def sources_identity(folders: Sequence[Path], without: Sequence[Path] = ()) -> str:
    """sha256 over the Python files below `folders`, leaving out what lies in or is one of `without`."""
    digest = hashlib.sha256()
    for folder in folders:
        for path in sorted(folder.rglob("*.py")):
            if not any(path.is_relative_to(excluded) for excluded in without):
                digest.update(f"{path.relative_to(folder.parent).as_posix()}\0".encode())
                digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def readable(argv: Sequence[str]) -> str:
    """A command as one would type it: quoted where needed, with the interpreter as plain "python"."""
    return shlex.join(["python" if argument == sys.executable else argument for argument in argv])


def run_command(argv: Sequence[str]) -> None:
    """Run to the end. Raises `StepFailed` where it fails; stops it and all it started where this process is stopped."""
    with started(argv) as process:
        status = process.wait()
    if status != 0:
        raise StepFailed(f"status {status} from: {readable(argv)}")


@contextmanager
def started(argv: Sequence[str]) -> Iterator[subprocess.Popen]:
    """A running command; at the end of the block it is stopped, with all of its process group."""
    # A group of its own: Ctrl-C reaches this process alone, which then asks the group to end, once.
    process = subprocess.Popen(argv, start_new_session=True)
    try:
        yield process
    finally:
        stop_group(process)


def stop_group(process: subprocess.Popen, patience_s: float = PATIENCE_S) -> None:
    """End a process that leads its group: ask it to interrupt itself, then to terminate, then kill the whole group."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            # The leader alone: a job takes its own children down, in the order that suits them.
            process.send_signal(number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience_s)
    finally:
        # What outlived its leader has no one to answer to; and a second Ctrl-C means that all of it goes now.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
