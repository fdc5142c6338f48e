"""An elastic run on two nodes that loses one of them, with everything on it, and goes on with the workers left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training import losses, recipe, write_data
from tests.training_ranks import train_on

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]


def test_a_lost_node_costs_its_workers_and_no_sample(tmp_path: Path) -> None:
    prepared = write_data(tmp_path / "prepared")
    undisturbed = recipe(prepared, tmp_path / "a", run__checkpoint_every=100)
    train_on(2, undisturbed, tmp_path / "logs")
    elastic = recipe(prepared, tmp_path / "b", scaling__num_workers=[1, 2])
    settings = tmp_path / "settings.json"
    settings.write_text(elastic.model_dump_json())
    # A process of its own: this cluster is to lose a node, and no other test's shall.
    command = [sys.executable, "-c", f"from {__name__} import run_on_two_nodes; run_on_two_nodes({str(settings)!r})"]
    # Ray's first try after the loss still counts on the lost node; it shall not wait a minute for it.
    hasty = {**os.environ, "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=hasty)
    assert done.returncode == 0, done.stderr[-4000:]
    said = (tmp_path / "b" / "said").read_text()
    assert re.search(r"\(step 2, every file verified; written by 2 workers, loaded by 1\)", said), said[-4000:]
    found, expected = losses(elastic), losses(undisturbed)
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


def run_on_two_nodes(settings_path: str) -> None:
    """Start the cluster and run what is to be disturbed."""
    import ray
    from ray.cluster_utils import Cluster

    from pipelines.training.launch import train
    from pipelines.training.settings import TrainSettings

    small = {"num_cpus": 1, "object_store_memory": 128 * 2**20, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=small)
    try:
        cluster.add_node(resources={"doomed": 1}, **{k: v for k, v in small.items() if k != "include_dashboard"})
        ray.init(cluster.address, log_to_driver=False, logging_level="WARNING")
        train(TrainSettings.model_validate(json.loads(Path(settings_path).read_text())), doomed_worker)
    finally:
        ray.shutdown()
        cluster.shutdown()


def doomed_worker(config: dict[str, Any]) -> None:
    """`train_worker`; in step 4 of the first attempt the second node dies, its raylet and its worker at once."""
    import ray

    from pipelines.training import loop

    storage = Path(config["settings"]["run"]["storage"])
    sys.stdout = sys.stderr = (storage / "said").open("a", buffering=1)
    doomed = [node["NodeID"] for node in ray.nodes() if "doomed" in node["Resources"] and node["Alive"]]
    step = loop.WorkerRun.step

    def disturbed(self: Any, number: int, *rest: Any) -> None:
        if number == 3 and ray.get_runtime_context().get_node_id() in doomed:
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        step(self, number, *rest)

    loop.WorkerRun.step = disturbed  # type: ignore[method-assign]
    loop.train_worker(config)
