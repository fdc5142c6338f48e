"""From settings to a service that runs until it is told to stop: the order of the steps, and nothing else."""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import sys

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from pipelines.ray_session import start_ray
from pipelines.serving.app import build_app
from pipelines.serving.checkpoint_files import CheckpointError
from pipelines.serving.settings import ServeArgs
from pipelines.serving.transport import set_environment

APPLICATION = "flashsloth"


def serve_application(args: ServeArgs, host: str, port: int, request_timeout_s: float) -> int:
    """Start Ray and the service in it, and wait for Ctrl-C or SIGTERM; then let answers that are under way finish.

    Args:
        args: of the application.
        host: address to listen on.
        port: to listen on.
        request_timeout_s: after this long a request is given up.

    Returns:
        The exit status: 0 once it was stopped; 1 where it did not start, after one line on stderr that says why.
    """
    try:
        app = build_app(args)
        _check_port_is_free(host, port)
        set_environment()
        start_ray()
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # after Ray, which sets a handler of its own that aborts
    try:
        return _serve(app, HTTPOptions(host=host, port=port, request_timeout_s=request_timeout_s))
    except KeyboardInterrupt:
        print("stopping: waiting for answers that are under way", flush=True)
        serve.delete(APPLICATION)  # the end of Ray alone would cut the connections first
        return 0
    finally:
        _stop()


def _serve(app: Application, options: HTTPOptions) -> int:
    """Start the application and wait for ever; returns only where it does not start."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    serve.start(http_options=options, logging_config=quiet)
    try:
        serve.run(app, name=APPLICATION, logging_config=quiet)
    except RuntimeError as error:  # Serve's word for a replica that did not start
        print(f"error: the service did not start: {_reason(error)}", file=sys.stderr)
        serve.delete(APPLICATION)  # else it stays on a cluster that was joined, and is in the way of the next one
        return 1
    print(f"serving at http://{_address(options.host, options.port)}/v1 (Ctrl-C stops)", flush=True)
    while True:
        signal.pause()


def _stop() -> None:
    """Leave nothing behind, and leave alone what is not ours: on a cluster that was joined, others may use Serve."""
    if os.environ.get("RAY_ADDRESS") and not serve.status().applications:
        serve.shutdown()
    ray.shutdown()  # ends a cluster of our own, and Serve with it


def _check_port_is_free(host: str, port: int) -> None:
    """Serve itself would retry on a taken port without an end."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        other = "--port" if error.errno in (errno.EADDRINUSE, errno.EACCES) else "--host"
        raise OSError(f"cannot listen on {_address(host, port)} ({error.strerror}); choose another {other}") from error


def _address(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _reason(error: RuntimeError) -> str:
    """The line of Serve's report that names the checkpoint's fault, else all of it."""
    status = serve.status().applications.get(APPLICATION)
    report = status.message if status and status.message else str(error)
    deployments = status.deployments.values() if status else ()
    lines = [line.strip() for text in (*(d.message for d in deployments), report) for line in text.splitlines()]
    return next((line.split("Error: ", 1)[1] for line in lines if "CheckpointError: " in line), report)
