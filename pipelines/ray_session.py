"""The one place where a job gets its Ray from.

Submitted with `ray job submit`, or with `RAY_ADDRESS` set, a job joins that cluster. Otherwise it starts a cluster of
its own on this machine, which lives as long as the job. A cluster that merely happens to run on this machine is never
joined: plain `ray.init()` would, and a laptop's experiment would then land on somebody else's cluster.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray


def start_ray(num_cpus: int | None = None) -> None:
    """Connect this process to Ray, and say on stdout to which one.

    Args:
        num_cpus: CPUs that a cluster of our own announces; all of the machine's where None. A cluster that is joined
            keeps what it has.

    Raises:
        ConnectionError: `RAY_ADDRESS` is set and nothing answers there; no local cluster is started in its place. Or
            there is none to start on a machine that is too busy.
    """
    if ray.is_initialized():
        return
    # Ray ends a task where a node runs out of memory, and begins it again: by its default without an end.
    os.environ.setdefault("RAY_task_oom_retries", "10")
    address = os.environ.get("RAY_ADDRESS")
    if address:
        _join(address)
    else:
        _start_local(num_cpus)


def start_cluster(**options: Any) -> None:
    """Start a cluster on this machine by `ray.init` with `options`, and connect to it.

    Ray gives its own processes 15 s to be there, for which a busy machine may need longer: then it is tried once more.

    Raises:
        ConnectionError: they were late again.
    """
    for last in (False, True):
        try:
            ray.init("local", **options)
            return
        except Exception as error:
            if type(error) is not Exception:  # all that Ray says where its processes were late
                raise
            said = str(error).partition(". ")[0]
            if last:
                raise ConnectionError(
                    f"Ray did not start on this machine, twice ({said}): it waits 15 s for some of its processes, and "
                    "a busy machine needs longer; end what else runs, or see /tmp/ray/session_latest/logs"
                ) from error
            print(f"ray: did not start in time ({said}); trying once more", flush=True)


@contextmanager
def one_cluster_for_jobs() -> Iterator[Callable[[], None]]:
    """Yields what starts a cluster, or joins one as `start_ray` does; where it is not called, there is none.

    From that call to the end of the block, it is also where every job goes that this process starts.

    Raises:
        ConnectionError: From the call, as `start_ray`.
    """
    before = os.environ.get("RAY_ADDRESS")

    def start() -> None:
        start_ray()
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address

    try:
        yield start
    finally:
        os.environ.pop("RAY_ADDRESS", None)
        if before is not None:
            os.environ["RAY_ADDRESS"] = before
        ray.shutdown()


def largest_cluster() -> dict[str, float]:
    """Resources of the cluster as it is, or as its autoscaler may make it."""
    now = ray.cluster_resources()
    limits = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    return {name: max(now.get(name, 0), limits.get(name, 0)) for name in ("CPU", "GPU")}


def _join(address: str) -> None:
    host, _, port = address.rpartition(":")
    if port.isdigit() and "://" not in address:
        _check_answers(address, host, int(port))
    ray.init(address, logging_level=logging.WARNING)
    nodes = sum(node["Alive"] for node in ray.nodes())
    print(f"ray: joined the cluster at {address} ({nodes} nodes, {_describe_resources()})", flush=True)


def _check_answers(address: str, host: str, port: int) -> None:
    """Ray itself retries for minutes before it says that nobody is there."""
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError as error:
        raise ConnectionError(f"RAY_ADDRESS={address}: no Ray cluster answers there ({error})") from error


def _start_local(num_cpus: int | None) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray protects a local cluster with a token by default. Given none, it writes a world-readable one to ~/.ray.
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    # It then warns that the cluster is protected, which nobody has to act on.
    logging.getLogger("ray._private.authentication").setLevel(logging.ERROR)
    start_cluster(num_cpus=num_cpus, include_dashboard=False, logging_level=logging.WARNING)
    print(f"ray: started a local cluster ({_describe_resources()})", flush=True)


def _describe_resources() -> str:
    resources = ray.cluster_resources()
    return f"{resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
