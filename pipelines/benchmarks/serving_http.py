"""The contestants of `jobs/benchmark.py serve` behind HTTP: applications of Ray Serve on one Ray, and their clients."""

from __future__ import annotations

import asyncio
import base64
import json
import socket
import time
from itertools import cycle, islice
from statistics import median

import ray
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from pipelines.benchmarks.http_client import Connection, post_request
from pipelines.benchmarks.plain_app import build_plain_app
from pipelines.benchmarks.rounds import Figures, timed
from pipelines.benchmarks.serving_local import QUESTION
from pipelines.benchmarks.static_engine import build_static_app
from pipelines.ray_session import start_ray
from pipelines.serving.app import build_app
from pipelines.serving.settings import ServeArgs
from pipelines.serving.transport import set_environment, wait_until_routed

SERVICE, STATIC, PLAIN, PLAIN_STREAM = "service", "static", "plain", "plain/stream"
_QUIET = LoggingConfig(log_level="ERROR", enable_access_log=False)


class Applications:
    """Ours; static batching; and Serve alone, whose answers of `ready_tokens` tokens are ready.

    Args:
        args: how the model is served.
        ready_tokens: length of the answers that are ready.
        photos: JPEG files, asked about in turn.
    """

    def __init__(self, args: ServeArgs, ready_tokens: int, photos: list[bytes]) -> None:
        self._photos = [base64.b64encode(photo).decode() for photo in photos]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        set_environment("127.0.0.1")  # as jobs/serve.py does
        start_ray(num_cpus=4)
        serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port), logging_config=_QUIET)
        apps = {
            SERVICE: build_app(args),
            STATIC: build_static_app(args),
            PLAIN: build_plain_app(args, ready_tokens),
        }
        for name, app in apps.items():
            serve.run(app, name=name, route_prefix=f"/{name}", logging_config=_QUIET)
        for name in apps:
            wait_until_routed("127.0.0.1", port, f"/{name}")
        self._address = f"http://127.0.0.1:{port}"

    def requests_per_s(self, name: str, clients: int, lengths: list[int]) -> Figures:
        """`clients` clients, each sending its share of the requests, of `lengths` tokens, one after the other."""
        # Written before the clock starts: this process takes its time from the cores that the service needs.
        photos = cycle(self._photos)
        requests = [(self._request(name, next(photos), length), length) for length in lengths]
        return {"requests_per_s": len(lengths) / timed(lambda: asyncio.run(self._ask_all(name, clients, requests)))}

    def first_token(self, name: str, num_requests: int, length: int) -> Figures:
        """From sending a request to the first text of its answer, alone."""
        photos = islice(cycle(self._photos), num_requests)
        requests = [self._request(name, photo, length, stream=True) for photo in photos]
        return asyncio.run(self._first_tokens(requests))

    def close(self) -> None:
        """Stop Ray, and all that runs on it."""
        ray.shutdown()

    def _request(self, name: str, photo: str, length: int, stream: bool = False) -> bytes:
        picture = {"type": "image_url", "image_url": {"url": f"data:image/jpeg;base64,{photo}"}}
        content = [picture, {"type": "text", "text": QUESTION}]
        messages = [{"role": "user", "content": content}]
        body = {"model": "bench", "messages": messages, "max_tokens": length, "stream": stream}
        return post_request(f"{self._address}/{name}/v1/chat/completions", json.dumps(body).encode())

    async def _ask_all(self, name: str, clients: int, requests: list[tuple[bytes, int]]) -> None:
        waiting = iter(requests)

        async def client() -> None:
            async with Connection.to(self._address) as connection:
                for request, length in waiting:
                    answer = await connection.ask(request)
                    if answer["usage"]["completion_tokens"] != length:
                        raise ValueError(f"{name}: asked for {length} tokens: {answer}")

        await asyncio.gather(*(client() for _ in range(clients)))

    async def _first_tokens(self, requests: list[bytes]) -> Figures:
        times = []
        async with Connection.to(self._address) as connection:
            for request in requests:
                start = time.perf_counter()
                num_events = 0
                async for _ in connection.stream(request):
                    num_events += 1
                    if num_events == 2:  # who speaks, and the first text
                        times.append(time.perf_counter() - start)
        return {"first_token_ms": 1000 * median(times)}
