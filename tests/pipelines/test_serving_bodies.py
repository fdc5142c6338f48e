"""Bodies on their way in: how much of them is held at once, and whose time they take."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import pytest
from pydantic import ValidationError

from pipelines.serving.errors import ApiError
from pipelines.serving.http import build_http
from pipelines.serving.image_urls import Hold
from pipelines.serving.replies import Reply
from pipelines.serving.service import READERS, Service
from pipelines.serving.settings import Limits, Policy
from tests.serving import png
from tests.serving_http import LIMITS, Backend, body, user, with_image

SCOPE = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": []}
BODY = json.dumps(body(max_tokens=2)).encode()


class Client:
    """Sends its body in two parts, the second one when it is let."""

    def __init__(self, content: bytes = BODY) -> None:
        self.half = asyncio.Event()
        """It waits to send the second part."""
        self.may_end = asyncio.Event()
        self.leaves = False
        self.sent: list[Any] = []
        self._parts = [content[: len(content) // 2], content[len(content) // 2 :]]

    async def receive(self) -> dict[str, Any]:
        if len(self._parts) == 1:
            self.half.set()
            await self.may_end.wait()
            if self.leaves:
                return {"type": "http.disconnect"}
        if not self._parts:
            await asyncio.Event().wait()
        return {"type": "http.request", "body": self._parts.pop(0), "more_body": bool(self._parts)}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    def ask(self, service: Service) -> asyncio.Task[None]:
        return asyncio.create_task(build_http(service)(SCOPE, self.receive, self.send))

    @property
    def status(self) -> int:
        return self.sent[0]["status"]

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.sent[1]["body"])["error"]


def adopt(service: Service, **changes: Any) -> None:
    service.adopt(Policy(limits=LIMITS.model_copy(update=changes)))


def test_a_body_that_does_not_fit_beside_the_others_is_told_to_come_back(service: Service) -> None:
    async def check() -> None:
        room = int(1.25 * len(BODY))
        adopt(service, max_body_bytes=room, max_open_body_bytes=room)
        first, second, third = Client(), Client(), Client()
        asking = first.ask(service)
        await first.half.wait()
        second.may_end.set()
        await second.ask(service)
        assert (second.status, second.error["code"], second.error["type"]) == (429, "overloaded", "rate_limit_error")
        assert (b"retry-after", b"1") in second.sent[0]["headers"]
        first.may_end.set()
        await asking
        assert (first.status, service._num_body_bytes) == (200, 0)
        third.may_end.set()
        await third.ask(service)
        assert third.status == 200

    asyncio.run(check())


def test_a_body_is_held_until_its_prompt_goes_to_an_engine(
    service: Service, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    read = service.read

    async def reading(content: bytes, hold: Hold) -> Any:
        held.append(service._num_body_bytes)
        return await read(content, hold)

    async def answer(prompt: Any) -> Reply:
        held.append(service._num_body_bytes)
        raise ApiError(503, "no engine can answer at the moment; try again", "unavailable")

    monkeypatch.setattr(service, "read", reading)
    monkeypatch.setattr(backend, "answer", answer)

    async def check() -> None:
        client = Client()
        client.may_end.set()
        await client.ask(service)
        assert client.status == 503

    asyncio.run(check())
    assert held == [len(BODY), 0]


@pytest.mark.parametrize(
    ("content", "status"), [(b"{}", 422), (b"x" * (LIMITS.max_body_bytes + 1), 413), (BODY, 499), (BODY, 408)]
)
def test_whatever_becomes_of_a_request_its_body_is_held_no_longer(
    service: Service, content: bytes, status: int
) -> None:
    async def check() -> None:
        client = Client(content)
        client.leaves = status == 499
        adopt(service, deadline_s=0.05 if status == 408 else 60)
        asking = client.ask(service)
        await client.half.wait()
        assert service._num_body_bytes == len(content) // 2
        if status != 408:
            client.may_end.set()
        await asking
        assert (client.status, service._num_body_bytes, service._num_open) == (status, 0, 0)

    asyncio.run(check())


def test_the_time_that_a_body_takes_is_not_taken_from_its_answer(
    service: Service, backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes nearly all of the time that it may."""
    monotonic, late = time.monotonic, [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + late[0])
    answer = backend.answer

    async def slow(prompt: Any) -> Reply:
        late[0] += LIMITS.deadline_s - 5
        await asyncio.sleep(0.01)
        return await answer(prompt)

    monkeypatch.setattr(backend, "answer", slow)

    async def check() -> None:
        client = Client()
        asking = client.ask(service)
        await client.half.wait()
        late[0] += LIMITS.deadline_s - 5
        client.may_end.set()
        await asking
        assert client.status == 200, client.error

    asyncio.run(check())


def test_all_bodies_together_may_be_as_large_as_one() -> None:
    assert Limits(max_body_bytes=1000, max_open_body_bytes=1000).max_open_body_bytes == 1000
    with pytest.raises(ValidationError, match="max_open_body_bytes is 999, less than max_body_bytes, 1000"):
        Limits(max_body_bytes=1000, max_open_body_bytes=999)


def test_what_waits_too_long_for_a_reader_is_told_to_come_back_and_not_read_any_more(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_read = threading.Event()
    read: list[bytes] = []
    monkeypatch.setattr(service, "_read", lambda content, limits: read.append(content))

    async def check() -> None:
        adopt(service, deadline_s=0.2)
        for _ in range(READERS):  # busy with pictures of others
            service._readers.submit(may_read.wait, 60)
        client = Client()
        client.may_end.set()
        await client.ask(service)
        assert (client.status, client.error["code"]) == (503, "deadline")
        assert (service._num_body_bytes, service._num_open) == (0, 0)

    try:
        asyncio.run(check())
    finally:
        may_read.set()
    service._readers.submit(lambda: None).result(timeout=60)
    assert not read


@pytest.mark.parametrize(("room", "status"), [(4000, 200), (2000, 429)])
def test_images_that_are_fetched_are_held_like_bodies(
    service: Service, monkeypatch: pytest.MonkeyPatch, room: int, status: int
) -> None:
    picture, held = png(0), list[int]()

    async def fetch(address: str, hold: Hold) -> bytes:
        hold(3000)
        held.append(service._num_body_bytes)
        return picture

    content = json.dumps(body(messages=[user(with_image("http://pictures.example/a.png"))], max_tokens=1)).encode()

    async def check() -> None:
        adopt(service, max_body_bytes=1000, max_open_body_bytes=room)
        monkeypatch.setattr(service._images, "fetch", fetch)
        client = Client(content)
        client.may_end.set()
        await client.ask(service)
        assert client.status == status
        assert service._num_body_bytes == 0

    asyncio.run(check())
    assert held == ([len(content) + 3000] if status == 200 else [])
