"""Whether a name is asked for at the Hugging Face hub, which stands here on this machine, or does not stand at all."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from pipelines.hub import for_any_process, is_missing, only_local, where
from pipelines.serving.transport import free_port


class _KnowsNothing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(404)
        self.send_header("x-error-code", "RepoNotFound")
        self.send_header("content-length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _KnowsNothing)
    thread = Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def ask(endpoint: str, name: str) -> str:
    """What a process finds out whose hub is at `endpoint`."""
    code = f"from pipelines.hub import only_local; print(only_local({name!r}))"
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    return run.stdout.strip()


def test_a_folder_is_only_local(tmp_path: Path) -> None:
    assert only_local(str(tmp_path))
    assert where(str(tmp_path), True) == str(tmp_path)


def test_a_folder_is_named_for_processes_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tower").mkdir()
    monkeypatch.chdir(tmp_path)
    assert for_any_process("tower") == str(tmp_path / "tower")
    assert for_any_process("google/tower") == "google/tower"
    assert not is_missing("tower")
    assert is_missing(str(tmp_path / "nothing"))


def test_what_can_be_no_repository_is_only_local(tmp_path: Path) -> None:
    name = str(tmp_path / "nothing")
    assert only_local(name)
    assert where(name, True) == name
    assert (
        where("outputs/nothing", True) == "outputs/nothing (no folder here, and the Hugging Face hub was not reached)"
    )


def test_a_hub_that_answers_is_asked_for_the_files(hub: str) -> None:
    assert ask(hub, "outputs/nothing") == "False"


def test_a_hub_that_is_away_is_not_waited_for() -> None:
    assert ask(f"http://127.0.0.1:{free_port()}", "outputs/nothing") == "True"
