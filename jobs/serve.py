"""Serve a checkpoint over HTTP, in the shape of the OpenAI API.

    python jobs/serve.py --checkpoint outputs/instruct/export
    curl http://127.0.0.1:8000/v1/models
    python jobs/serve.py token ALICE     # a token for a client, and the hash of it that the service keeps

Runs until Ctrl-C or SIGTERM, then lets answers that are under way finish.
"""

from __future__ import annotations

import argparse
import sys

import yaml
from pydantic import Field

from pipelines.exit_status import exit_status
from pipelines.serving.authentication import hash_token, new_token
from pipelines.serving.settings import ServeArgs
from pipelines.settings import JobSettings, load_settings


class ServeSettings(JobSettings, ServeArgs):  # type: ignore[misc]  # a SettingsConfigDict is a ConfigDict
    """Serve a checkpoint over HTTP."""

    host: str = "127.0.0.1"
    """Address to listen on. Open it to others only with `tokens` set, and behind a reverse proxy that does TLS."""

    port: int = Field(default=8000, ge=1, le=65535)
    """Port to listen on."""

    request_timeout_s: float = Field(default=240, gt=0)
    """After this long, its body's time included, a request is given up and answered with an error."""


def main(argv: list[str] | None = None) -> int:
    """Run the service until it is told to stop. Returns the exit status: 0, 1 after one line on stderr, 130."""
    arguments = sys.argv[1:] if argv is None else argv
    if arguments[:1] == ["token"]:
        return _make_token(arguments[1:])
    settings = load_settings(ServeSettings, arguments, prog="serve.py")
    return exit_status(lambda: _serve(settings), stopped="nothing is served")


def _serve(settings: ServeSettings) -> int:
    deadline_s, timeout_s = settings.limits.deadline_s, settings.request_timeout_s
    if deadline_s >= timeout_s:
        raise ValueError(
            f"limits.deadline_s is {deadline_s:g}, not below request_timeout_s, {timeout_s:g}: a request would be cut "
            "off without a word; lower the one or raise the other"
        )
    # Ray Serve takes seconds to import; --help and a misspelt flag are answered before.
    from pipelines.serve import serve_application

    args = ServeArgs(**settings.model_dump(include=set(ServeArgs.model_fields)))
    return serve_application(args, settings.host, settings.port, timeout_s)


def _make_token(arguments: list[str]) -> int:
    text = "Make a token for a client, and the hash of it that the service keeps."
    parser = argparse.ArgumentParser(prog="serve.py token", description=text)
    parser.add_argument("name", metavar="NAME", help="the client; no leading dash")
    name = parser.parse_args(arguments).name
    if name.startswith("-"):
        parser.error(f"a client's name begins with no dash, as {name!r} does")
    token = new_token()
    print(f"token, shown this once: {token}")
    # Written as YAML writes it: names such as 42, no or "a: b" would be read as something else.
    print(
        "for the recipe or Serve file:",
        yaml.safe_dump({"tokens": {name: hash_token(token)}}, allow_unicode=True),
        sep="\n",
        end="",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
