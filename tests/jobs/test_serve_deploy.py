"""`serve run` and `serve deploy cluster/serve.yaml`, as an operator types them, on a cluster of their own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipelines.serving.transport import free_port
from tests.fixtures.ray_session import REPOSITORY
from tests.serving import read_metrics

pytestmark = pytest.mark.ray

PATIENCE_S = 150
CLUSTER = """
import ray, signal, sys
ray.init("local", num_cpus=4, include_dashboard=True, dashboard_port=int(sys.argv[1]), object_store_memory=2**28)
print("address", ray.get_runtime_context().gcs_address, flush=True)
signal.pause()
"""


def serve_command(*arguments: str) -> list[str]:
    return [str(Path(sys.executable).with_name("serve")), *arguments]


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """The environment that leads to a running cluster with a dashboard, which `serve deploy` talks to."""
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", CLUSTER, str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    try:
        address = next(line.split()[1] for line in process.stdout if line.startswith("address"))
        yield {**os.environ, "RAY_ADDRESS": address, "RAY_DASHBOARD_ADDRESS": f"http://127.0.0.1:{port}"}
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + PATIENCE_S
    while True:
        try:
            found = condition()
        except (OSError, AssertionError, KeyError):  # nobody listens yet, or a replica just goes
            found = None
        if found:
            return found
        assert time.monotonic() < deadline, f"not within {PATIENCE_S} s: {what}"
        time.sleep(0.2)


def ask(address: str, max_tokens: int) -> int:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": max_tokens}
    try:
        request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode())
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


def replicas(address: str) -> set[str]:
    metrics = asyncio.run(read_metrics(address))
    return {*metrics["flashsloth_engine_slots"], *metrics["flashsloth_open_requests"]}


def config_for_here(checkpoint: Path, port: int, folder: Path, user_config: dict[str, Any]) -> str:
    """cluster/serve.yaml with the model, the device and the port of this test."""
    config = yaml.safe_load((REPOSITORY / "cluster" / "serve.yaml").read_text())
    config["http_options"]["port"] = port
    (application,) = config["applications"]
    application["args"] |= {"checkpoint": str(checkpoint), "model_name": "tiny", "num_gpus": 0, "num_replicas": 1}
    application["args"] |= {"device": "cpu", "dtype": "float32", "max_replicas": 1, "num_ingress_replicas": 1}
    application["args"]["engine"] = {"max_slots": 4}
    (ingress,) = application["deployments"]
    ingress["user_config"] = user_config
    file = folder / "serve.yaml"
    file.write_text(yaml.safe_dump(config))
    return str(file)


def deploy(file: str, cluster: dict[str, str]) -> None:
    done = subprocess.run(
        serve_command("deploy", file), cwd=REPOSITORY, env=cluster, capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_serve_file_deploys_and_user_config_changes_limits_without_a_restart(
    cluster: dict[str, str], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    deploy(config_for_here(tiny_checkpoint, port, tmp_path, {}), cluster)
    wait_for(lambda: ask(address, 8) == 200, "an answer")
    before = replicas(address)
    assert len(before) == 2
    deploy(config_for_here(tiny_checkpoint, port, tmp_path, {"limits": {"max_tokens": 7}}), cluster)
    wait_for(lambda: ask(address, 8) == 422, "the new limit")
    assert ask(address, 7) == 200
    deploy(config_for_here(tiny_checkpoint, port, tmp_path, {"limits": {"max_tokns": 9}}), cluster)
    deploy(config_for_here(tiny_checkpoint, port, tmp_path, {"limits": {"max_tokens": 8}}), cluster)
    wait_for(lambda: ask(address, 8) == 200, "the limit after the one that was misspelt")
    assert ask(address, 9) == 422
    assert replicas(address) == before


def test_serve_run_starts_the_application(cluster: dict[str, str], tiny_checkpoint: Path) -> None:
    """On the same cluster, and so behind the same port: `serve run` replaces what is there."""
    arguments = (f"checkpoint={tiny_checkpoint}", "model_name=again", "device=cpu", "num_cpus=1")
    process = subprocess.Popen(
        serve_command("run", "pipelines.serving.app:build_app", *arguments, "--name", "flashsloth"),
        cwd=REPOSITORY,
        env=cluster,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    output = ""
    try:
        for line in process.stdout:
            output += line
            if "is ready at" in line:
                break
        assert "is ready at" in output, output
        address = line.split("is ready at ")[1].split()[0].rstrip("./")
        with urllib.request.urlopen(f"{address}/v1/models", timeout=60) as response:
            assert [model["id"] for model in json.load(response)["data"]] == ["again"]
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=PATIENCE_S)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
