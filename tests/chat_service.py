"""A service that speaks the OpenAI API as far as an annotation asks it, and answers what a test wants."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

UNROUTED = "Path '/v1/models' not found. Ping http://.../-/routes for available routes."  # in Ray Serve's words


class Service(ThreadingHTTPServer):
    """Answers as `reply(number of the request, body)` says: a status and a JSON value."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}/v1"
        self.asked: list[dict[str, Any]] = []
        self.tokens: set[str | None] = set()
        self.models: list[str] | None = ["tiny"]
        self.hashes: dict[str, str] = {}
        self.reply: Callable[[int, dict[str, Any]], tuple[int, Any]] = lambda number, body: (200, completion("Yes."))
        self.retry_after = "0"
        self.unrouted = 0  # requests for the list of models that come too early
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that are killed, which tests do, are no error of this service's."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Service

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        with self.server.lock:
            if self.server.unrouted > 0:
                self.server.unrouted -= 1
                return self._answer(404, UNROUTED)
        if self.server.models is None:
            return self._answer(404, {"detail": "Not Found"})
        hashes = {name: {"hash": self.server.hashes[name]} for name in self.server.hashes}
        data = [{"id": name, "object": "model", **hashes.get(name, {})} for name in self.server.models]
        self._answer(200, {"object": "list", "data": data})

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        data = self.rfile.read(length)
        if len(data) < length:  # a client that left while it sent
            return
        body = json.loads(data)
        with self.server.lock:
            number = len(self.server.asked)
            self.server.asked.append(body)
            self.server.tokens.add(self.headers.get("Authorization"))
        self._answer(*self.server.reply(number, body))

    def _answer(self, status: int, value: Any) -> None:
        data = value.encode() if isinstance(value, str) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if status in (429, 503):
            self.send_header("Retry-After", self.server.retry_after)
        self.end_headers()
        self.wfile.write(data)


def completion(text: str | None, reason: str = "stop", tokens: int = 2) -> dict[str, Any]:
    message = {"role": "assistant", "content": text}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "tiny",
        "choices": [{"index": 0, "message": message, "finish_reason": reason}],
        "usage": {"prompt_tokens": 7, "completion_tokens": tokens, "total_tokens": 7 + tokens},
    }


def refusal(message: str, code: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
