"""What a worker asks of, and tells to, whoever runs it: Ray Train with a supervisor on the driver, or nobody."""

from __future__ import annotations

import threading
import time
from enum import IntEnum
from typing import Any

import ray
import ray.train
from ray.actor import ActorHandle
from ray.train import Checkpoint, CheckpointUploadMode
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2.api.preemption import PreemptionInfo

from pipelines.training.checkpoint import remove_remains
from pipelines.training.ranks import Ranks
from pipelines.training.supervisor import Outcome

_NODE_DIGITS = 8
"""Of a node's id, as people are shown it."""


class Request(IntEnum):
    """What a worker is asked to do at the end of its step; of several the largest counts."""

    NOTHING = 0
    CHECKPOINT = 1
    """Save now and go on: a machine of this run is about to be taken away."""
    STOP = 2
    """Save now and end: the job is being stopped."""


class Host:
    """Nobody: what a run without Ray does."""

    def request(self) -> Request:
        """What this rank has been asked to do since it last asked; the ranks agree among themselves."""
        return Request.NOTHING

    def report(self, name: str, step: int) -> None:
        """The checkpoint of `step` is complete. Every rank calls this, between the same two steps."""

    def clean(self, run_uri: str, ranks: Ranks) -> None:
        """Remove what killed attempts left in the run's folder."""

    def end(self, outcome: Outcome) -> None:
        """The workers end now, for a reason that a restart would not mend."""
        raise SystemExit(outcome.message)


class RayHost(Host):
    """Ray Train, and a `Supervisor`."""

    def __init__(self, supervisor: ActorHandle | None, rank: int) -> None:
        self._supervisor = supervisor
        self._rank = rank
        self._stopping = threading.Event()
        self._notice: Any = None
        if supervisor:
            node = ray.get_runtime_context().get_node_id()
            supervisor.settle.remote(rank, f"{ray.util.get_node_ip_address()} (node {node[:_NODE_DIGITS]})")
        if supervisor and rank == 0:
            threading.Thread(target=self._listen, name="supervisor", daemon=True).start()

    def request(self) -> Request:
        """As `Host.request`: a stop from the driver, a checkpoint where Ray says that a node is being drained."""
        if self._stopping.is_set():
            return Request.STOP
        # `ray.train.get_preemption_info` is a barrier over an actor; this is what it reads, and the ranks agree anyway.
        notice = get_train_context().preemption_context.preemption_info
        if notice is not None and notice != self._notice:
            self._notice = notice
            if self._rank == 0:
                print(_announce(notice, time.time()), flush=True)
            return Request.CHECKPOINT
        return Request.NOTHING

    def report(self, name: str, step: int) -> None:
        """As `Host.report`: to Ray Train, and to whoever looks after the run's checkpoints."""
        place = ray.train.get_context().get_storage()
        ray.train.report(
            {"step": step},
            checkpoint=Checkpoint(f"{place.experiment_fs_path}/{name}", place.storage_filesystem),
            checkpoint_dir_name=name,
            checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
        )
        if self._supervisor and self._rank == 0:
            self._supervisor.saved.remote()

    def clean(self, run_uri: str, ranks: Ranks) -> None:
        """As `Host.clean`: old checkpoints, which are complete, are the driver's to delete."""
        remove_remains(run_uri, ranks)

    def end(self, outcome: Outcome) -> None:
        """As `Host.end`."""
        if self._supervisor and self._rank == 0:
            ray.get(self._supervisor.end.remote(outcome.model_dump()))

    def _listen(self) -> None:
        while not self._stopping.is_set():
            try:
                asked = ray.get(self._supervisor.stop_asked.remote())  # type: ignore[union-attr]
            except ray.exceptions.RayError:
                return  # the driver is gone, and this process goes with it
            if asked:
                self._stopping.set()


def _announce(notice: PreemptionInfo, now_s: float) -> str:
    """What a notice that machines will be taken away means for the run."""
    nodes = "; ".join(
        f"node {node[:_NODE_DIGITS]} with ranks {ranks}" for node, ranks in notice.preempted_node_to_ranks.items()
    )
    left = f" in {max(0.0, notice.deadline_ms / 1000 - now_s):.0f} s" if notice.deadline_ms else ""
    return f"to be taken away{left}: {nodes}. A checkpoint is saved now; then the run restarts without them"
