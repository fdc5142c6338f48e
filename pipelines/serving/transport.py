"""How Ray Serve carries requests between its processes. Its defaults are made for calls that are rare and large.

The settings are read by each process of Serve when it starts, so they stand in the environment before Ray does; on a
cluster, in that of every node (cluster/Dockerfile).
"""

from __future__ import annotations

import os

ENVIRONMENT = {
    # Between proxy, ingress and engine, a gRPC message. As a Ray task, every piece of a stream would be an object that
    # is announced, owned and freed. The messages go to servers that each replica starts anyway, behind Ray's own token.
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    # One event loop per process: ours, Serve's and that of Serve's router would wake each other for every message.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    # A process that does not answer its health check any more will not finish its requests either.
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    # An ingress tokenizes short texts, many at once: waking a pool of threads for each takes longer than the text.
    "TOKENIZERS_PARALLELISM": "false",
}


def set_environment() -> None:
    """Let the Ray that this process starts carry requests so; what the caller has set himself stays."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
