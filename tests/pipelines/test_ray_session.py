"""Where a job gets its Ray from: a local cluster of its own, or the one it is told, and never another."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import ray

from pipelines.ray_session import start_ray
from tests.fixtures.ray_session import REPOSITORY

SCRIPT = """
import ray
from pipelines.ray_session import start_ray
start_ray(num_cpus=1)
from ray._raylet import AuthenticationMode, get_authentication_mode
print(ray.get_runtime_context().gcs_address, "token:", get_authentication_mode() == AuthenticationMode.TOKEN)
"""


def run_script(tmp_path, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HOME": str(tmp_path), **variables}
    environment.pop("RAY_AUTH_MODE")
    environment.update(variables)
    return subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_started_session_is_kept() -> None:
    address = ray.get_runtime_context().gcs_address
    start_ray()
    assert ray.get_runtime_context().gcs_address == address


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_workers_import_the_packages_and_the_tests() -> None:
    @ray.remote
    def import_them() -> str:
        import flashsloth  # noqa: F401
        import pipelines
        from tests.fixtures import ray_session  # noqa: F401

        return pipelines.__name__

    assert ray.get(import_them.remote()) == "pipelines"


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_local_cluster_is_our_own_and_protected(tmp_path) -> None:
    """Another cluster runs on this machine (the fixture's): it is not joined, and no token is left in the home."""
    run = run_script(tmp_path)
    assert run.returncode == 0, run.stderr
    assert "ray: started a local cluster (1 CPUs, 0 GPUs)" in run.stdout
    assert ray.get_runtime_context().gcs_address not in run.stdout
    assert "token: True" in run.stdout
    assert not (tmp_path / ".ray").exists()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_ray_address_is_joined(tmp_path) -> None:
    address = ray.get_runtime_context().gcs_address
    run = run_script(tmp_path, RAY_ADDRESS=address, RAY_AUTH_MODE="disabled")
    assert run.returncode == 0, run.stderr
    assert f"ray: joined the cluster at {address} (1 nodes, 4 CPUs, 0 GPUs)" in run.stdout


def test_an_address_that_nobody_answers_is_an_error(tmp_path) -> None:
    run = run_script(tmp_path, RAY_ADDRESS="127.0.0.1:1", RAY_AUTH_MODE="disabled")
    assert run.returncode != 0
    assert "RAY_ADDRESS=127.0.0.1:1: no Ray cluster answers there" in run.stderr


@pytest.mark.parametrize(
    ("error", "tries", "raised"),
    [
        # What Ray raises then is no class of its own.
        (Exception("The current node timed out during startup. This could ..."), 2, ConnectionError),
        (ValueError("no such thing"), 1, ValueError),
    ],
)
def test_a_machine_that_is_too_busy_gets_a_second_try(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    tries: int,
    raised: type[Exception],
) -> None:
    started: list[str] = []

    def fail(address: str, **_: Any) -> None:
        started.append(address)
        raise error

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", fail)
    with pytest.raises(raised, match=str(error).partition(".")[0]):
        start_ray()
    assert started == ["local"] * tries
    assert capsys.readouterr().out.count("trying once more") == tries - 1
