"""Processes that are killed, with SIGKILL, at a named write; for tests of what the next run makes of it.

A server process imports everything once and forks a child for each run: it has no threads, so forking it is safe, and
no open connection to a store, which must not cross a fork.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

from pipelines import storage
from pipelines.settings import JobSettings, dump_settings
from tests.corpus import encoded

Found = TypeVar("Found")
When = Literal["before", "midway", "after"]
_SECONDS = 60
_WRITES = ("write_bytes", "put_if_absent")
_REPOSITORY = Path(__file__).parents[1]
_DRIVER = """
import sys
from jobs.{job} import main
from tests.kills import Kill, kill_at
recipe, *kill = sys.argv[1:]
if kill:
    kill_at(Kill(*kill))
sys.exit(main(["--config", recipe]))
"""
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preparation", "tests.annotation", "s3fs"])


class Kill(NamedTuple):
    """The instant of a process's end: about its first write to a path that matches `path`.

    `midway`, local files alone: the data is written beside its place, and not yet moved there.
    """

    path: str
    when: When


def kill_at(kill: Kill) -> None:
    """Let this process be killed then. It writes through `pipelines.storage`, as everything does."""
    for name in _WRITES:
        setattr(storage, name, _killing(getattr(storage, name), kill))


def start_driver(job: str, settings: JobSettings, folder: Path, address: str, *kill: str) -> subprocess.Popen[str]:
    """A job's driver in a process of its own that joins the cluster at `address`, killed as `Kill(*kill)` says."""
    (folder / "recipe.yaml").write_text(dump_settings(settings), "utf-8")
    env = {**os.environ, "RAY_ADDRESS": address}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    command = [sys.executable, "-c", _DRIVER.format(job=job), str(folder / "recipe.yaml"), *kill]
    return subprocess.Popen(command, cwd=_REPOSITORY, env=env, **pipes)


def _killing(write: Callable[..., Any], kill: Kill) -> Callable[..., Any]:
    def run(uri: str, data: bytes, *digest: str) -> Any:
        if not re.search(kill.path, uri):
            return write(uri, data, *digest)
        if kill.when == "before":
            _die()
        if kill.when == "midway":
            os.fsync = lambda descriptor: _die()
        written = write(uri, data, *digest)
        if kill.when == "after":
            _die()
        return written

    return run


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def run_apart(work: Callable[..., Any], *arguments: Any, kill: Kill | None = None, env: Mapping[str, str]) -> Any:
    """What `work(*arguments)` returns in a process of its own; None where it was killed, as `kill` says.

    Raises:
        RuntimeError: what `work` raised.
    """
    [done] = run_together(1, work, *arguments, kill=kill, env=env)
    return done


def run_together(
    count: int, work: Callable[..., Any], *arguments: Any, kill: Kill | None = None, env: Mapping[str, str]
) -> list[Any]:
    """`run_apart` in several processes at once."""
    started = []
    for _ in range(count):
        ours, theirs = _CONTEXT.Pipe()
        process = _CONTEXT.Process(target=_child, args=(theirs, work, arguments, kill, dict(env)))
        process.start()
        theirs.close()
        started.append((process, ours))
    results = []
    for process, pipe in started:
        try:
            answer = pipe.recv() if pipe.poll(_SECONDS) else ("hung", None)
        except EOFError:
            answer = ("killed", None)
        process.join(_SECONDS if answer[0] != "hung" else 0)
        if process.is_alive():
            process.kill()
        results.append((process, answer))
    for process, (how, what) in results:
        expected = -signal.SIGKILL if kill else 0
        if how not in ("done", "killed") or process.exitcode != expected:
            raise RuntimeError(f"{how} with exit code {process.exitcode}, expected {expected}: {what}")
    return [what for _, (_, what) in results]


def _child(
    pipe: Connection, work: Callable[..., Any], arguments: tuple[Any, ...], kill: Kill | None, env: dict[str, str]
) -> None:
    os.environ.update(env)
    if kill:
        kill_at(kill)
    try:
        answer = ("done", work(*arguments))
    except Exception as error:
        answer = ("failed", f"{type(error).__name__}: {error}")
    pipe.send(answer)


class Blocked:
    """An image that is a pipe, so that whoever reads it waits, until `release` puts the image in its place."""

    def __init__(self, path: Path, number: int) -> None:
        self.path, self.number = path, number
        path.unlink()
        os.mkfifo(path)

    def release(self) -> None:
        """For all who read it from now on; who waits already waits on."""
        beside = self.path.with_suffix(".new")
        beside.write_bytes(encoded(self.number))
        os.replace(beside, self.path)


def wait(look: Callable[[], Found | None], what: str, seconds: float = 90) -> Found:
    deadline = time.monotonic() + seconds
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}"
        time.sleep(0.02)
    return found
