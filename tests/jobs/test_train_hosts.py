"""`jobs/train.py` over several hosts that share an object store alone; one of them is cut off and comes back."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines import storage
from pipelines.settings import load_settings
from pipelines.training.export import write_export
from pipelines.training.run_log import read_metrics
from pipelines.training.settings import TrainSettings
from tests.fixtures.host_cluster import HostCluster, run_cluster, wait_until
from tests.fixtures.hosts import HostsUnavailable
from tests.fixtures.ray_session import REPOSITORY
from tests.fixtures.tiny import build_processor, build_tiny_model
from tests.prepared import coloured_rows, write_prepared
from tests.training_ranks import train_on

pytestmark = [pytest.mark.ray, pytest.mark.s3, pytest.mark.timeout(1800)]

NUM_STEPS = 90
CHECKPOINT_EVERY = 15
_RUN_SECONDS = 300  # four processes import torch and DeepSpeed, on whatever else the machine does

_START_SUPERVISORS = """
import ray
from pipelines.training.supervisor import start_supervisor
ray.init()
supervisors = [start_supervisor() for _ in range(2)]
ray.get([supervisor.quiet_for.remote() for supervisor in supervisors])
nodes = {actor["Address"]["NodeID"] for actor in ray._private.state.actors().values()}
print("here" if nodes == {ray.get_runtime_context().get_node_id()} else nodes)
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[HostCluster]:
    try:
        with run_cluster(num_workers=2) as cluster:
            yield cluster
    except HostsUnavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture(scope="module")
def bucket(cluster: HostCluster) -> str:
    """Where a tiny model and its data lie."""
    bucket = cluster.s3.new_bucket()
    processor = build_processor()
    model = build_tiny_model(processor)
    write_export(f"{bucket}/model", model, model.state_dict(), processor, step=0)
    write_prepared(f"{bucket}/data", coloured_rows(20, text_only_every=3), processor)
    return bucket


def words(bucket: str, name: str) -> list[str]:
    """What follows `jobs/train.py`: ZeRO-2 in fp32, one rank on each of the hosts beside the head."""
    settings = {
        "model.checkpoint": f"{bucket}/model",
        "data.folders": f"{bucket}/data",
        "batch.global_size": 8,
        "batch.micro_size": 2,
        "max_steps": NUM_STEPS,
        "deepspeed.stage": 2,
        "precision": "fp32",
        "scaling.placement": "STRICT_SPREAD",
        "run.name": name,
        "run.storage": f"{bucket}/runs",
        "run.log_every": 1,
        "run.checkpoint_every": CHECKPOINT_EVERY,
    }
    recipe = ["--config", str(REPOSITORY / "jobs" / "recipes" / "tiny-instruct.yaml")]
    return recipe + [word for key, value in settings.items() for word in (f"--{key}", str(value))]


def test_what_looks_after_a_run_stays_on_the_host_of_its_driver(cluster: HostCluster) -> None:
    # Ray puts an actor that asks for no CPU on any host: a run must not end with a host that it could do without.
    assert cluster.start_driver("supervisors", "-c", _START_SUPERVISORS).end(_RUN_SECONDS).endswith("\nhere\n")


def losses(run: str) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(run)}


def complete_checkpoints(run: str) -> list[str]:
    names = [name for name in storage.list_names(run) if name.startswith("step-")]
    return [name for name in names if storage.exists(f"{run}/{name}/checkpoint.json")]


def test_a_host_that_is_cut_off_and_comes_back_leaves_no_trace_in_the_losses(
    cluster: HostCluster, bucket: str, tmp_path: Path
) -> None:
    undisturbed, disturbed = f"{bucket}/runs/undisturbed", f"{bucket}/runs/disturbed"
    # The same settings on two plain ranks of one host: what becomes of a run depends on neither Ray nor hosts.
    train_on(2, load_settings(TrainSettings, words(bucket, "undisturbed"), prog="train.py"), tmp_path / "logs")
    expected = losses(undisturbed)
    assert list(expected) == list(range(1, 1 + NUM_STEPS))
    assert expected[NUM_STEPS] < 0.5 * expected[1]

    lost = cluster.workers[0]
    driver = cluster.start_driver("disturbed", str(REPOSITORY / "jobs" / "train.py"), *words(bucket, "disturbed"))
    wait_until(lambda: bool(complete_checkpoints(disturbed)), _RUN_SECONDS, "a checkpoint", driver.said)
    cluster.network.cut_off(lost)
    assert f"step {NUM_STEPS}/" not in driver.said(), "trained to the end before the cut"
    wait_until(lambda: lost.address not in cluster.alive(), 60, f"{lost.address} counts as dead", cluster.logs)
    cluster.network.plug_in(lost)
    wait_until(lambda: lost.address in cluster.alive(), 120, f"{lost.address} has joined again", cluster.logs)
    said = driver.end(_RUN_SECONDS)

    assert losses(disturbed) == expected  # bit for bit
    assert exported_files(disturbed) == exported_files(undisturbed)
    assert re.search(rf"^lost rank \d on {lost.address} \(node ", said, re.MULTILINE), said
    assert "no checkpoint yet: starting at step 0" in said
    resumed = re.findall(r"resuming from \S+/disturbed/step-\d+-\w+ \(step (\d+), every file verified", said)
    assert len(resumed) == 1, said
    assert int(resumed[0]) in range(CHECKPOINT_EVERY, NUM_STEPS, CHECKPOINT_EVERY)


def exported_files(run: str) -> dict[str, str]:
    """The sha256 of each file of the model that a run has left."""
    return json.loads(storage.read_bytes(f"{run}/export/export.json"))["files"]
