"""An elastic run on three nodes: one dies with everything on it, one is drained as a spot machine is, one is left."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.training import completed, losses, recipe, write_data
from tests.training_ranks import train_on

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

NOTICE_S = 10
"""Between the notice that a node will be taken away and its end."""


def test_a_dead_node_and_a_drained_one_cost_their_workers_and_no_sample(tmp_path: Path) -> None:
    prepared = write_data(tmp_path / "prepared")
    undisturbed = recipe(prepared, tmp_path / "a", run__checkpoint_every=100)
    train_on(2, undisturbed, tmp_path / "logs")
    # A death counts as a failure, and no second one is allowed; a node that is taken away does not count.
    elastic = recipe(prepared, tmp_path / "b", scaling__num_workers=[1, 2], run__max_failures=1)
    settings = tmp_path / "settings.json"
    settings.write_text(elastic.model_dump_json())
    # A process of its own: this cluster is to lose nodes, and no other test's shall.
    command = [sys.executable, "-c", f"from {__name__} import run_on_nodes; run_on_nodes({str(settings)!r})"]
    hasty = {
        # Ray's first try after the loss still counts on the lost node; it shall not wait a minute for it.
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "20",
        "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "0.5",
    }
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=os.environ | hasty)
    said = (tmp_path / "b" / "said").read_text()
    assert done.returncode == 0, done.stderr[-4000:] + said[-4000:]
    assert re.search(r"^lost rank \d on \S+ \(node [0-9a-f]{8}\) \(.*\)", done.stdout, re.MULTILINE), done.stdout
    assert "resuming from" in said and "(step 2, every file verified" in said, said[-4000:]
    # The notice makes a checkpoint where none was due, and the run goes on from it with the worker that is left.
    assert re.search(r"to be taken away in \d+ s: node [0-9a-f]{8} with ranks \[\d\]", said), said[-4000:]
    assert "(step 5, every file verified; written by 2 workers, loaded by 1)" in said, said[-4000:]
    found, expected = losses(elastic), losses(undisturbed)
    assert list(found) == list(expected)
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-5)


def run_on_nodes(settings_path: str) -> None:
    """Start the cluster and run what is to be disturbed."""
    import ray
    from ray.cluster_utils import Cluster

    from pipelines.training.launch import train
    from pipelines.training.settings import TrainSettings

    small = {"num_cpus": 1, "object_store_memory": 128 * 2**20}
    cluster = Cluster(
        initialize_head=True, head_node_args=small | {"include_dashboard": False, "include_log_monitor": False}
    )
    try:
        for _ in range(2):
            cluster.add_node(**small)
        ray.init(cluster.address, log_to_driver=False, logging_level="WARNING")
        train(TrainSettings.model_validate(json.loads(Path(settings_path).read_text())), disturbed_worker)
    finally:
        ray.shutdown()
        cluster.shutdown()


def disturbed_worker(config: dict[str, Any]) -> None:
    """`train_worker`; the node of a worker dies in step 4, and that of another one is drained in step 5."""
    from pipelines.training import loop

    storage = Path(config["settings"]["run"]["storage"])
    sys.stdout = sys.stderr = (storage / "said").open("a", buffering=1)
    step = loop.WorkerRun.step

    def disturbed(self: Any, number: int, *rest: Any) -> None:
        first = self.ranks.share(_first(storage / str(number)) if self.rank == 0 and number in (3, 4) else False)
        chosen = self.rank == _last_off_the_head(self)
        if first and number == 3 and chosen:
            completed(storage / "run", "step-00000002")
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        if first and number == 4:
            if chosen:
                _drain_this_node()
            _wait_for_notice()
        if number == 5 and self.world_size == 2:
            time.sleep(60)  # the step that the node does not live to see
        step(self, number, *rest)

    loop.WorkerRun.step = disturbed  # type: ignore[method-assign]
    loop.train_worker(config)


def _first(marker: Path) -> bool:
    try:
        marker.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _last_off_the_head(run: Any) -> int:
    """The last rank that is not on the head's node, which this cluster cannot do without; -1 where there is none."""
    import ray

    [head] = [node["NodeID"] for node in ray.nodes() if "node:__internal_head__" in node["Resources"]]
    nodes = run.ranks.gather(ray.get_runtime_context().get_node_id())
    return max((rank for rank, node in enumerate(nodes) if node != head), default=-1)


def _drain_this_node() -> None:
    """What a cloud's notice leads to, and `ray drain-node` does."""
    import ray
    from ray._raylet import GcsClient  # type: ignore[attr-defined]  # compiled
    from ray.core.generated import autoscaler_pb2

    context = ray.get_runtime_context()
    accepted, why_not = GcsClient(address=context.gcs_address).drain_node(
        context.get_node_id(),
        autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
        "spot",
        int(1000 * (time.time() + NOTICE_S)),
    )
    assert accepted, why_not


def _wait_for_notice() -> None:
    from ray.train.v2._internal.execution.context import get_train_context

    deadline = time.monotonic() + NOTICE_S
    while get_train_context().preemption_context.preemption_info is None:
        assert time.monotonic() < deadline, "Ray Train has not told this worker that a node is being drained"
        time.sleep(0.05)
