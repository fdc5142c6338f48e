"""From settings to a service that runs until it is told to stop: the order of the steps, and nothing else."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray import serve
from ray._private.ray_logging import global_worker_stdstream_dispatcher as dispatcher
from ray.exceptions import RayError
from ray.serve import Application
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from pipelines.exit_status import INTERRUPTED
from pipelines.ray_session import largest_cluster, start_ray
from pipelines.serving.app import build_app
from pipelines.serving.settings import ServeArgs
from pipelines.serving.transport import set_environment, wait_until_routed

APPLICATION = "flashsloth"
REMOVAL_S = 30  # what Serve takes to remove replicas that have ended or have to be killed


def serve_application(args: ServeArgs, host: str, port: int, request_timeout_s: float) -> int:
    """Start Ray and the service in it, and wait for Ctrl-C or SIGTERM; then let answers that are under way finish.

    Args:
        args: of the application.
        host: address to listen on.
        port: to listen on.
        request_timeout_s: after this long a request is given up.

    Returns:
        The exit status: 0 once it was stopped; 1 where a replica did not start or did not end, after one line on
        stderr that says so; 130 where a second Ctrl-C has cut answers off.

    Raises:
        ValueError: the checkpoint cannot be served, or the cluster can never hold the service.
        OSError: the port is taken, or nobody answers at `RAY_ADDRESS`.
        BotoCoreError: nobody answers where the checkpoint is.
    """
    app = build_app(args)
    _check_port_is_free(host, port)
    set_environment(host)
    start_ray()
    _check_room(args)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # after Ray, which sets a handler of its own that aborts
    try:
        return _serve(app, HTTPOptions(host=host, port=port, request_timeout_s=request_timeout_s))
    except KeyboardInterrupt:
        return _let_finish(args.drain_s)
    finally:
        _stop()


def _serve(app: Application, options: HTTPOptions) -> int:
    """Start the application and wait for ever; returns only where it does not start."""
    host = options.host or "127.0.0.1"
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    try:
        with _ray_unheard():
            serve.start(http_options=options, logging_config=quiet)
            serve.run(app, name=APPLICATION, logging_config=quiet)
            if not os.environ.get("RAY_ADDRESS"):  # which may listen where this process does not reach it
                wait_until_routed({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), options.port, "/")
    except RuntimeError as error:  # Serve's word for a replica that did not start
        print(f"error: the service did not start: {_reason(error)}", file=sys.stderr)
        _delete(REMOVAL_S)  # else it stays on a cluster that was joined, and is in the way of the next one
        return 1
    print(f"serving at http://{_address(host, options.port)}/v1 (Ctrl-C stops)", flush=True)
    while True:
        signal.pause()


def _let_finish(drain_s: float) -> int:
    """Take the service down, its answers first: the end of Ray alone would cut the connections."""
    waiting = f"waiting up to {drain_s:g} s for answers that are under way"
    try:
        print(f"stopping: {waiting} (Ctrl-C again ends at once)", flush=True)
        if _delete(drain_s + REMOVAL_S):
            return 0
        print(f"error: the service has not ended within {drain_s + REMOVAL_S:g} s, and is cut off", file=sys.stderr)
    except (RayError, RayServeException) as error:
        print(f"error: the service is gone: {str(error).splitlines()[0]}", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped; answers that were under way are cut off", file=sys.stderr)
        return INTERRUPTED
    return 1


def _delete(patience_s: float) -> bool:
    """Delete the application; whether it has gone in time. Serve's own waiting ends after a minute, in an error."""
    deadline = time.monotonic() + patience_s
    serve.delete(APPLICATION, _blocking=False)
    while APPLICATION in serve.status().applications:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _stop() -> None:
    """Leave nothing behind, and leave alone what is not ours: on a cluster that was joined, others may use Serve."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is left takes seconds, and half of it would be a traceback
    if os.environ.get("RAY_ADDRESS") and not serve.status().applications:
        serve.shutdown()
    ray.shutdown()  # ends a cluster of our own, and Serve with it


@contextmanager
def _ray_unheard() -> Iterator[None]:
    """Print nothing that Ray streams from its processes while the service starts; its log files have all of it.

    Why a replica does not start, Serve's controller tells in a traceback per attempt; we say it in one line. After an
    error nothing more is printed.
    """
    streamed = [(name, handler) for name, handler in dispatcher.handlers if name == "ray_print_logs"]
    for name, _ in streamed:
        dispatcher.remove_handler(name)
    yield
    for name, handler in streamed:
        dispatcher.add_handler(name, handler)


def _check_room(args: ServeArgs) -> None:
    """Make sure that the cluster can hold the service, now or once it has grown: Serve itself would wait for ever.

    Raises:
        ValueError: it never can.
    """
    asked = {
        "CPU": args.num_replicas * args.num_cpus + args.num_ingress_replicas * args.ingress_num_cpus,
        "GPU": args.num_replicas * args.num_gpus,
    }
    now, largest = ray.cluster_resources(), largest_cluster()
    for name, amount in asked.items():
        if amount <= now.get(name, 0):
            continue
        each = f"{args.num_replicas} x {args.num_cpus if name == 'CPU' else args.num_gpus:g} for engines"
        if name == "CPU":
            each += f", {args.num_ingress_replicas} x {args.ingress_num_cpus:g} for ingresses"
        found = f"the service asks for {amount:g} {name}s ({each}); the cluster has {now.get(name, 0):g}"
        if amount > largest[name]:
            flags = "--num_cpus, --ingress_num_cpus" if name == "CPU" else "--num_gpus"
            raise ValueError(f"{found}: lower {flags} or --num_replicas, or use a larger cluster")
        print(f"{found} and may grow to {largest[name]:g}: waiting for it to grow", flush=True)


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
    """What the last replica that did not start has raised, where Serve's report says it; else all of the report."""
    status = serve.status().applications.get(APPLICATION)
    report = status.message if status and status.message else str(error)
    deployments = status.deployments.values() if status else ()
    lines = [line.strip() for text in (*(d.message for d in deployments), report) for line in text.splitlines()]
    raised = [match[1] for line in lines if (match := re.match(r"[\w.]+(?:Error|Exception): (?!Traceback)(.+)", line))]
    return raised[-1] if raised else report
