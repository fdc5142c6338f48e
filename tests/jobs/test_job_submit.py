"""A cluster started by hand, and a training job submitted to it: the two commands of the README, with a token."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from pipelines.serving.transport import free_port
from tests.fixtures.ray_session import REPOSITORY
from tests.fixtures.tiny import build_processor
from tests.prepared import coloured_rows, write_prepared

pytestmark = pytest.mark.ray


@dataclass
class Cluster:
    """A running head node, and the environment in which `ray` talks to it."""

    dashboard: str
    folder: Path
    environment: dict[str, str]


def ray(*arguments: str, environment: dict[str, str], timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("ray")), *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=timeout_s)


def environment_with_token(folder: Path) -> dict[str, str]:
    token = folder / "auth_token"
    token.write_text(secrets.token_hex(32))
    token.chmod(0o600)
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    environment.pop("PYTHONPATH")  # the job must find its sources in what was uploaded
    return environment


def stop_cluster(folder: Path) -> None:
    """End what runs with this cluster's temporary folder on its command line, and what that started.

    `ray stop` would end every cluster of this machine.
    """
    own: set[psutil.Process] = set()
    for process in psutil.process_iter(["cmdline"]):
        if any(str(folder) in argument for argument in process.info["cmdline"] or ()):
            own |= {process, *process.children(recursive=True)}
    for process in own:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(own, timeout=30)


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    folder = Path(tempfile.mkdtemp(prefix="ray-head-"))  # short: a Unix socket's path must stay below 108 characters
    environment = environment_with_token(folder)
    dashboard = free_port()
    options = {
        "node-ip-address": "127.0.0.1",
        "port": free_port(),
        "dashboard-host": "127.0.0.1",
        "dashboard-port": dashboard,
        "dashboard-agent-listen-port": free_port(),
        "ray-client-server-port": free_port(),
        "min-worker-port": 0,  # any free one: other clusters may run on this machine
        "max-worker-port": 0,
        "num-cpus": 4,
        "object-store-memory": 512 * 2**20,
        "include-log-monitor": "false",  # a job's own output does not go through it
        "temp-dir": folder,
    }
    try:
        flags = [f"--{name}={value}" for name, value in options.items()]
        started = ray("start", "--head", *flags, "--disable-usage-stats", environment=environment, timeout_s=120)
        assert started.returncode == 0, started.stdout + started.stderr
        yield Cluster(f"http://127.0.0.1:{dashboard}", folder, environment)
    finally:
        stop_cluster(folder)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.timeout(1200)
def test_a_training_job_is_submitted_to_a_cluster_started_by_hand(
    cluster: Cluster, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    data = write_prepared(tmp_path / "data", coloured_rows(16), build_processor())
    overrides = {
        "model.checkpoint": tiny_checkpoint,
        "data.folders": json.dumps([data]),
        "run.name": "submitted",
        "run.storage": tmp_path / "runs",
        "max_steps": 2,
        "scaling.num_workers": 1,
    }
    submitted = ray(
        *("job", "submit", "--address", cluster.dashboard, "--working-dir", ".", "--"),
        *("python", "jobs/train.py", "--config", "jobs/recipes/tiny-instruct.yaml"),
        *(f"--{name}={value}" for name, value in overrides.items()),
        environment=cluster.environment,
        timeout_s=480,  # DeepSpeed compiles in the first run on a machine
    )
    log = submitted.stdout + submitted.stderr
    assert submitted.returncode == 0, log
    assert re.search(r"Job 'raysubmit_\w+' succeeded", log), log
    assert "ray: joined the cluster at" in log, log
    export = tmp_path / "runs" / "submitted" / "export"
    assert json.loads((export / "config.json").read_text())["model_type"] == "flashsloth"
    check_what_was_uploaded(cluster.folder)

    stranger = {**cluster.environment, "RAY_AUTH_MODE": "disabled"}
    refused = ray("job", "list", "--address", cluster.dashboard, environment=stranger)
    assert refused.returncode != 0
    assert "raysubmit_" not in refused.stdout


def check_what_was_uploaded(folder: Path) -> None:
    """The sources, and none of what lies beside them in a working copy."""
    (uploaded,) = folder.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    names = {path.name for path in uploaded.iterdir()}
    assert {"jobs", "pipelines", "flashsloth", "pyproject.toml"} <= names
    assert not {".venv", ".git", ".pytest_cache", "outputs"} & names
