"""A running service for tests, and a load on it that keeps account of every answer."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import io
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import psutil
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from pipelines.serving.app import build_app
from pipelines.serving.settings import ServeArgs
from pipelines.serving.transport import free_port

QUIET = LoggingConfig(log_level="ERROR", enable_access_log=False)
APPLICATION = "service"


@contextlib.contextmanager
def running_service(args: ServeArgs) -> Iterator[str]:
    """The address of a service on the Ray that is there."""
    port = free_port()
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port), logging_config=QUIET)
    try:
        serve.run(build_app(args), name=APPLICATION, logging_config=QUIET)
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


def list_files(folder: Path) -> None:
    """Write `export.json` into a checkpoint, as training does after an export."""
    hashes = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}
    (folder / "export.json").write_text(json.dumps({"files": hashes}))


def flip_a_bit(file: Path) -> None:
    """Change the last byte of a file."""
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def png(seed: int, width: int = 80, height: int = 60) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def data_uri(seed: int) -> str:
    return "data:image/png;base64," + base64.b64encode(png(seed)).decode()


def question(url: str, text: str = "What color is the square?") -> list[dict[str, Any]]:
    content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "user", "content": content}]


def request_body(seed: int, max_tokens: int, stream: bool = False) -> dict[str, Any]:
    """A question about one of eight pictures, or about none."""
    content: Any = "How many circles are there?"
    messages = [{"role": "user", "content": content}] if seed % 3 == 0 else question(data_uri(seed % 8))
    return {"model": "tiny", "messages": messages, "max_tokens": max_tokens, "stream": stream}


@dataclass
class Load:
    """Requests from many clients at once, and what came of them.

    Attributes:
        address: of the service.
        outcomes: how often each outcome was seen: a status, "broken" for a stream that ended in an error, or the name
            of an exception.
        seconds: how long each answer with status 200 took.
    """

    address: str
    outcomes: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    missing_retry_after: int = 0

    async def ask(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> str:
        """Send one request, read its answer to the end, and note the outcome."""
        start = time.monotonic()
        try:
            async with session.post(f"{self.address}/v1/chat/completions", json=body) as response:
                data = await response.read()
                outcome = str(response.status)
                if response.status in (429, 503) and "retry-after" not in response.headers:
                    self.missing_retry_after += 1
                if response.status == 200 and body["stream"] and not data.endswith(b"data: [DONE]\n\n"):
                    outcome = "broken"
                if response.status == 200 and not body["stream"]:
                    assert json.loads(data)["choices"][0]["finish_reason"] in ("stop", "length")
        except (aiohttp.ClientError, TimeoutError) as error:
            outcome = type(error).__name__
        if outcome == "200":
            self.seconds.append(time.monotonic() - start)
        self.outcomes[outcome] += 1
        return outcome

    async def ask_once(self, body: dict[str, Any]) -> str:
        """Send one request on a connection of its own."""
        async with aiohttp.ClientSession() as session:
            return await self.ask(session, body)

    async def leave_early(self, session: aiohttp.ClientSession, body: dict[str, Any]) -> None:
        """Begin to read a stream, and hang up."""
        with contextlib.suppress(aiohttp.ClientError):
            async with session.post(f"{self.address}/v1/chat/completions", json={**body, "stream": True}) as response:
                await response.content.readany()
                response.close()
        self.outcomes["left"] += 1

    @contextlib.asynccontextmanager
    async def running(
        self,
        num_clients: int,
        pick: Callable[[random.Random], dict[str, Any]],
        leavers: float = 0.0,
        pause_s: float = 0.0,
    ) -> AsyncIterator[None]:
        """Keep `num_clients` asking one request after the other for as long as the block lasts, then let them end.

        With `pause_s` each of them pauses up to so long in between, so that others get something of the machine.
        """
        stop = asyncio.Event()

        async def keep_asking(client: int) -> None:
            source = random.Random(client)
            while not stop.is_set():
                body = pick(source)
                if source.random() < leavers:
                    await self.leave_early(session, body)
                elif await self.ask(session, body) in ("429", "503"):
                    await asyncio.sleep(0.05 * source.random())
                if pause_s:
                    await asyncio.sleep(pause_s * source.random())

        connector = aiohttp.TCPConnector(limit=0)
        timeout = aiohttp.ClientTimeout(total=120)
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            clients = [asyncio.create_task(keep_asking(client)) for client in range(num_clients)]
            try:
                yield
            finally:
                stop.set()
                await asyncio.gather(*clients)


def replica_processes(deployment: str) -> list[psutil.Process]:
    """The processes of a deployment's replicas on the Ray that this process has started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            title = " ".join(process.cmdline())
            if title.startswith(f"ray::ServeReplica:{APPLICATION}:{deployment}"):
                found.append(process)
    return found


async def read_metrics(address: str) -> dict[str, dict[str, float]]:
    """Name of a metric -> replica -> the sum of its samples there."""
    async with aiohttp.ClientSession() as session, session.get(f"{address}/metrics") as response:
        assert response.status == 200
        text = await response.text()
    values: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            replicas = values.setdefault(sample.name, {})
            replica = sample.labels["replica"]
            replicas[replica] = replicas.get(replica, 0) + sample.value
    return values


async def total(address: str, name: str) -> float:
    """One metric, over all replicas."""
    return sum((await read_metrics(address)).get(f"flashsloth_{name}", {}).values())


async def until(condition: Callable[[], Any], patience_s: float, what: str) -> None:
    """Return once an async condition holds; fails where it does not in time."""
    deadline = time.monotonic() + patience_s
    while not await condition():
        assert time.monotonic() < deadline, f"not within {patience_s:g} s: {what}"
        await asyncio.sleep(0.1)
