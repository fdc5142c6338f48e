"""`python jobs/serve.py`: answers until it is told to stop, and says why it does not start."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import yaml
from ray.exceptions import RayActorError

import pipelines.serve
from jobs.serve import main
from pipelines.serve import _check_port_is_free, _check_room, _let_finish, _reason
from pipelines.serving.authentication import Clients
from pipelines.serving.settings import Policy, ServeArgs
from pipelines.serving.transport import free_port
from tests.fixtures.ray_session import REPOSITORY
from tests.serving import flip_a_bit, list_files


class Job:
    """A running `jobs/serve.py`, in a process group of its own."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "jobs/serve.py", *arguments],
            cwd=REPOSITORY,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.output = ""

    def wait_for_line(self, text: str) -> None:
        for line in self.process.stdout:
            self.output += line
            if text in line:
                return
        raise AssertionError(f"ended without {text!r}:\n{self.output}")

    def finish(self, timeout_s: float = 120) -> int:
        self.output += self.process.communicate(timeout=timeout_s)[0]
        return self.process.returncode


@pytest.fixture
def start_job() -> Iterator[Any]:
    jobs: list[Job] = []

    def start(*arguments: str, **environment: str) -> Job:
        jobs.append(Job(*arguments, **environment))
        return jobs[-1]

    yield start
    for job in jobs:
        if job.process.poll() is None:
            os.killpg(job.process.pid, signal.SIGKILL)
            job.process.wait()


def post(port: int, max_tokens: int) -> dict[str, Any]:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": max_tokens}
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/chat/completions", json.dumps(body).encode())
    with urllib.request.urlopen(request, timeout=120) as response:
        return json.load(response)


@pytest.mark.ray
def test_a_stop_lets_the_answer_that_is_under_way_finish(start_job: Any, tiny_checkpoint: Path) -> None:
    port = free_port()
    job = start_job("--checkpoint", str(tiny_checkpoint), "--port", str(port), "--device", "cpu")
    job.wait_for_line(f"serving at http://127.0.0.1:{port}/v1")
    answers: list[Any] = []

    def ask() -> None:
        try:
            answers.append(post(port, max_tokens=900))
        except (urllib.error.URLError, OSError) as error:
            answers.append(error)

    assert post(port, max_tokens=2)["usage"]["completion_tokens"] <= 2
    asking = threading.Thread(target=ask)
    asking.start()
    asking.join(timeout=0.3)
    assert asking.is_alive(), "the long answer came before the stop: ask for more tokens"
    job.process.send_signal(signal.SIGTERM)
    asking.join(timeout=120)
    assert isinstance(answers[0], dict), answers
    assert job.finish() == 0, job.output
    last = "stopping: waiting up to 110 s for answers that are under way (Ctrl-C again ends at once)"
    assert job.output.splitlines()[-1] == last  # and no word of Ray's
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # closed connections still hold it for a minute
        probe.bind(("127.0.0.1", port))


@pytest.mark.ray
def test_a_second_stop_ends_at_once(start_job: Any, tiny_checkpoint: Path) -> None:
    job = start_job("--checkpoint", str(tiny_checkpoint), "--port", str(free_port()), "--device", "cpu")
    job.wait_for_line("serving at")
    job.process.send_signal(signal.SIGINT)
    job.wait_for_line("stopping: waiting up to 110 s")
    job.process.send_signal(signal.SIGINT)
    assert job.finish() == 130, job.output
    assert job.output.splitlines()[-1] == "stopped; answers that were under way are cut off"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_before_anything_is_served_is_one_line(
    number: signal.Signals, start_job: Any, tiny_checkpoint: Path
) -> None:
    job = start_job("--checkpoint", str(tiny_checkpoint), "--port", str(free_port()), PYTHONVERBOSE="1")
    job.wait_for_line("import 'pipelines.serving.settings'")  # Ray is imported next
    job.wait_for_line("import 'ray.exceptions'")
    job.process.send_signal(number)
    assert job.finish() == 130, job.output[-3000:]
    assert "\nstopped; nothing is served\n" in job.output
    assert "Traceback" not in job.output


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_checkpoint_that_fails_while_loading_is_named(start_job: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """It looks right from outside, so it is found out in the replica; the job must not wait for it for ever.

    On a cluster that it joins: what it has started there goes with it.
    """
    folder = shutil.copytree(tiny_checkpoint, tmp_path / "changed")
    list_files(folder)
    flip_a_bit(folder / "model.safetensors")
    address = ray.get_runtime_context().gcs_address
    job = start_job(*("--checkpoint", str(folder), "--port", str(free_port()), "--device", "cpu"), RAY_ADDRESS=address)
    assert job.finish() == 1
    assert f"error: the service did not start: {folder}: model.safetensors has sha256" in job.output, job.output
    assert "Traceback" not in job.output, job.output
    with pytest.raises(ValueError, match="Failed to look up actor"):
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"num_gpus": 1}, r"asks for 1 GPUs \(1 x 1 for engines\); the cluster has 0: lower --num_gpus"),
        ({"num_cpus": 2, "num_replicas": 2}, r"asks for 4.5 CPUs \(2 x 2 for engines, 1 x 0.5 for ingresses\)"),
    ],
)
def test_a_service_that_the_cluster_can_never_hold_is_an_error(
    asked: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On one that can grow it is a line: Ray will start machines."""
    args = ServeArgs(checkpoint="x", **asked)
    with pytest.raises(ValueError, match=said):
        _check_room(args)
    monkeypatch.setattr(pipelines.serve, "largest_cluster", lambda: {"CPU": 8, "GPU": 8})
    _check_room(args)
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("and may grow to 8: waiting for it to grow")
    _check_room(ServeArgs(checkpoint="x"))
    assert not capsys.readouterr().out


class Serve:
    """Ray Serve with one application, which goes when it has been looked at so often."""

    def __init__(self, *, looks: int = 0, failure: BaseException | None = None) -> None:
        self._looks, self._failure = looks, failure
        self.applications: dict[str, Any] = {}

    def delete(self, name: str, _blocking: bool) -> None:
        self.applications[name] = None

    def status(self) -> Serve:
        if self._failure:
            raise self._failure
        self._looks -= 1
        if self._looks < 0:
            self.applications.clear()
        return self


@pytest.mark.parametrize(
    ("fake", "status", "said"),
    [
        (Serve(looks=1200), 0, ""),  # two minutes: longer than Serve itself would wait
        (Serve(looks=2000), 1, "error: the service has not ended within 140 s, and is cut off\n"),
        (Serve(failure=RayActorError()), 1, "error: the service is gone: The actor "),
        (Serve(failure=KeyboardInterrupt()), 130, "stopped; answers that were under way are cut off\n"),
    ],
)
def test_the_end_of_the_service_is_waited_for_as_long_as_its_answers_may_take(
    fake: Serve, status: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = [0.0]
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=lambda seconds: now.append(now.pop() + seconds))
    monkeypatch.setattr(pipelines.serve, "serve", fake)
    monkeypatch.setattr(pipelines.serve, "time", clock)
    assert _let_finish(110) == status
    assert capsys.readouterr().err.startswith(said)


def test_the_reason_is_what_the_replica_has_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    message = """The deployment failed to start 2 times in a row. Error:
ray.exceptions.RayTaskError(RuntimeError): ray::ServeReplica:flashsloth:Engine.initialize()
RuntimeError: Traceback (most recent call last):
  File "slots.py", line 50, in allocate
    raise ValueError(f"max_length is {length}, the model has {positions} positions")
ValueError: max_length is 100000, the model has 1024 positions
"""
    engine = SimpleNamespace(message=message)
    status = SimpleNamespace(message="Failed to update the deployments ['Engine'].", deployments={"Engine": engine})
    fake = SimpleNamespace(status=lambda: SimpleNamespace(applications={"flashsloth": status}))
    monkeypatch.setattr(pipelines.serve, "serve", fake)
    assert _reason(RuntimeError("failed")) == "max_length is 100000, the model has 1024 positions"
    engine.message = "no replica has come"
    assert _reason(RuntimeError("failed")) == "Failed to update the deployments ['Engine']."


def test_a_missing_checkpoint_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'none'}: no such folder")


def test_a_taken_port_is_an_error(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["--checkpoint", str(tiny_checkpoint), "--port", str(port)]) == 1
    assert f"error: cannot listen on 127.0.0.1:{port}" in capsys.readouterr().err


def test_a_typo_in_a_recipe_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "serve.yaml"
    recipe.write_text("checkpoint: x\nnum_replica: 4\n")
    with pytest.raises(SystemExit) as stopped:
        main(["--config", str(recipe)])
    assert stopped.value.code == 2
    assert f"{recipe}: unknown field 'num_replica'; did you mean 'num_replicas'?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["alice", "42", "no", "a: b #1", "é"])
def test_a_token_is_shown_once_and_kept_as_its_hash(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["token", name]) == 0
    first, _, recipe = capsys.readouterr().out.split("\n", 2)
    policy = Policy.model_validate(yaml.safe_load(recipe))
    clients = Clients(policy.tokens)
    token = first.rpartition(" ")[2]
    assert clients.authenticate(f"Bearer {token}", "127.0.0.1") == name
    assert token not in recipe


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["--help"], 0, "usage: serve.py token [-h] NAME"),
        ([], 2, "the following arguments are required: NAME"),
        (["a", "b"], 2, "unrecognized arguments: b"),
        (["--", "-x"], 2, "a client's name begins with no dash"),
    ],
)
def test_no_token_is_made_for_what_is_no_name(
    arguments: list[str], status: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["token", *arguments])
    assert stopped.value.code == status
    shown = capsys.readouterr()
    assert said in shown.out + shown.err
    assert "fs-" not in shown.out


def test_a_deadline_must_come_before_the_end_of_the_request(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", "x", "--limits.deadline_s", "90", "--request_timeout_s", "90"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: limits.deadline_s is 90, not below request_timeout_s, 90: ")


@pytest.mark.parametrize(
    ("checkpoint", "said"),
    [("foo://bar", "error: foo://bar: nothing that is installed knows foo://"), ("s3://bucket/x", "127.0.0.1:")],
)
def test_a_store_that_cannot_be_asked_is_an_error(
    checkpoint: str, said: str, no_s3: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--checkpoint", checkpoint]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert said in line


def test_an_address_of_ipv6_is_looked_at_as_one(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket(socket.AF_INET6) as taken:
        taken.bind(("::1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["--checkpoint", str(tiny_checkpoint), "--host", "::1", "--port", str(port)]) == 1
    said = capsys.readouterr().err
    assert said == f"error: cannot listen on [::1]:{port} (Address already in use); choose another --port\n"
    _check_port_is_free("::1", port)


def test_an_address_that_is_not_ours_calls_for_another_host(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--checkpoint", str(tiny_checkpoint), "--host", "192.0.2.1"]) == 1
    assert "cannot listen on 192.0.2.1:8000" in (said := capsys.readouterr().err)
    assert said.endswith("; choose another --host\n")
