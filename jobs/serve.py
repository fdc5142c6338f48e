"""Serve a checkpoint over HTTP, in the shape of the OpenAI API.

    python jobs/serve.py --checkpoint outputs/instruct/export
    curl http://127.0.0.1:8000/v1/models
    python jobs/serve.py token ALICE     # a token for a client, and the hash of it that the service keeps

Runs until Ctrl-C or SIGTERM, then lets answers that are under way finish.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys

import ray
from pydantic import Field
from ray import serve
from ray.serve import Application
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from pipelines.ray_session import start_ray
from pipelines.serving.app import build_app
from pipelines.serving.authentication import hash_token, new_token
from pipelines.serving.checkpoint import CheckpointError
from pipelines.serving.settings import ServeArgs
from pipelines.serving.transport import set_environment
from pipelines.settings import JobSettings, load_settings

APPLICATION = "flashsloth"


class ServeSettings(JobSettings, ServeArgs):  # type: ignore[misc]  # a SettingsConfigDict is a ConfigDict
    """Serve a checkpoint over HTTP."""

    host: str = "127.0.0.1"
    """Address to listen on. Open it to others only with `tokens` set, and behind a reverse proxy that does TLS."""

    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on."""

    request_timeout_s: float = Field(default=120, gt=0)
    """After this long a request is given up and answered with an error."""


def main(argv: list[str] | None = None) -> int:
    """Run the service until it is told to stop. Returns the exit status."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["token"]:
        return _make_token(arguments[1:])
    settings = load_settings(ServeSettings, argv, prog="serve.py")
    try:
        app = build_app(ServeArgs(**settings.model_dump(include=set(ServeArgs.model_fields))))
        _check_port_is_free(settings.host, settings.port)
        set_environment()
        start_ray()
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # after Ray, which sets a handler of its own that aborts
    try:
        return _serve(app, settings)
    except KeyboardInterrupt:
        print("stopping: waiting for answers that are under way", flush=True)
        serve.delete(APPLICATION)  # the end of Ray alone would cut the connections first
        return 0
    finally:
        _stop()


def _serve(app: Application, settings: ServeSettings) -> int:
    """Start the application and wait for ever; returns only where it does not start."""
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    quiet = LoggingConfig(log_level="WARNING", enable_access_log=False)
    options = HTTPOptions(host=settings.host, port=settings.port, request_timeout_s=settings.request_timeout_s)
    serve.start(http_options=options, logging_config=quiet)
    try:
        serve.run(app, name=APPLICATION, logging_config=quiet)
    except RuntimeError as error:  # Serve's word for a replica that did not start
        print(f"error: the service did not start: {_reason(error)}", file=sys.stderr)
        return 1
    print(f"serving at http://{settings.host}:{settings.port}/v1 (Ctrl-C stops)", flush=True)
    while True:
        signal.pause()


def _stop() -> None:
    """Leave nothing behind, and leave alone what is not ours: on a cluster that was joined, others may use Serve."""
    if os.environ.get("RAY_ADDRESS") and not serve.status().applications:
        serve.shutdown()
    ray.shutdown()  # ends a cluster of our own, and Serve with it


def _make_token(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("error: name the client that the token is for: serve.py token NAME", file=sys.stderr)
        return 2
    token = new_token()
    print(f"token, shown this once: {token}")
    print(f"for the recipe or Serve file:\ntokens:\n  {arguments[0]}: {hash_token(token)}")
    return 0


def _check_port_is_free(host: str, port: int) -> None:
    """Serve itself would retry on a taken port without an end."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(f"cannot listen on {host}:{port} ({error.strerror}); choose another --port") from error


def _reason(error: RuntimeError) -> str:
    """The line of Serve's report that names the checkpoint's fault, else all of it."""
    status = serve.status().applications.get(APPLICATION)
    report = status.message if status and status.message else str(error)
    deployments = status.deployments.values() if status else ()
    lines = [line.strip() for text in (*(d.message for d in deployments), report) for line in text.splitlines()]
    return next((line.split("Error: ", 1)[1] for line in lines if "CheckpointError: " in line), report)


if __name__ == "__main__":
    sys.exit(main())
