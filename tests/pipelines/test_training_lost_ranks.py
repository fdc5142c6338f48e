"""The line that names a lost rank and its machine, from what Ray Train hands over."""

from __future__ import annotations

from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from pipelines.training.lost_ranks import describe_loss

PLACES = {0: "10.0.0.1 (node aaaaaaaa)", 1: "10.0.0.2 (node bbbbbbbb)"}


def dead(text: str) -> WorkerHealthCheckFailedError:
    died = ActorDiedError()
    died.error_msg = f"The actor died unexpectedly before finishing this task.\n\tclass_name: RayTrainWorker\n{text}\n"
    return WorkerHealthCheckFailedError("A worker health check failed.", failure=died)


def test_the_dead_are_named_and_not_those_that_failed_for_their_sake():
    failures = {0: RuntimeError("[gloo] Connection closed by peer\nstack"), 1: dead("Its node was terminated.")}
    assert describe_loss(failures, PLACES) == (
        "lost rank 1 on 10.0.0.2 (node bbbbbbbb) (Its node was terminated.); 1 more stopped with it"
    )
    both = {rank: dead("Its node was terminated.") for rank in (0, 1)}
    assert describe_loss(both, PLACES).startswith("lost rank 0 on 10.0.0.1 (node aaaaaaaa), rank 1 on 10.0.0.2")
    unreachable = ActorUnavailableError("RPC failed", b"0" * 16)
    assert describe_loss({1: unreachable}, {}).startswith("lost rank 1 on an unknown machine (")


def test_where_nobody_died_the_first_error_is_told_in_a_line():
    failures = {1: ValueError("late"), 0: ValueError("the row is short\nTraceback ...")}
    told = describe_loss(failures, PLACES)
    assert told == ("failed: rank 0 on 10.0.0.1 (node aaaaaaaa) (ValueError: the row is short); 1 more stopped with it")
    assert len(describe_loss({0: dead("x " * 500)}, PLACES)) < 320
