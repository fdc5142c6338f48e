"""The HTTP surface of the service over an engine in this process, without Ray, and requests for it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
from PIL import Image
from starlette.testclient import TestClient

from pipelines.serving.engine import Engine, EngineSettings, Prompt
from pipelines.serving.errors import ApiError
from pipelines.serving.replies import Desk, Reply
from pipelines.serving.settings import Limits
from tests.fixtures.tiny import build_processor, build_tiny_model

LIMITS = Limits(
    max_body_bytes=60_000, max_image_pixels=10_000, max_prompt_tokens=160, max_tokens=32, default_max_tokens=6
)


class Backend:
    """An engine in this process, which remembers what it was given."""

    def __init__(self) -> None:
        processor = build_processor()
        self.engine = Engine(build_tiny_model(processor), processor, EngineSettings(max_slots=4))
        self.desk = Desk(self.engine)
        self.prompts: list[Prompt] = []
        self.error: Exception | None = None
        self.breaks_after: int | None = None

    async def answer(self, prompt: Prompt) -> Reply:
        self.prompts.append(prompt)
        if self.error:
            raise self.error
        reply = await self.desk.answer(prompt)
        if isinstance(reply, ApiError):
            raise reply
        return reply

    async def stream(self, prompt: Prompt) -> AsyncIterator[Reply]:
        self.prompts.append(prompt)
        pieces = 0
        async for reply in self.desk.stream(prompt):
            if self.error and pieces == (self.breaks_after or 0):
                raise self.error
            if isinstance(reply, ApiError):
                raise reply
            pieces += 1
            yield reply

    async def check(self) -> None:
        if self.error:
            raise self.error
        self.engine.check()


def data_uri(width: int = 40, height: int = 30, kind: str = "PNG") -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encoded(Image.fromarray(pixels), kind)


def encoded(image: Image.Image, kind: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def with_image(url: str, text: str = "What color is it?") -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]


def user(content: Any = "What color is it?") -> dict[str, Any]:
    return {"role": "user", "content": content}


def body(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [user(with_image(data_uri()))], **changes}


def post(client: TestClient, **changes: Any) -> Any:
    return client.post("/v1/chat/completions", json=body(**changes))


def stream(client: TestClient, **changes: Any) -> tuple[int, list[dict[str, Any]]]:
    """The status and the events of a stream; each ends in an empty line, the last one says that it is done."""
    response = post(client, stream=True, **changes)
    if response.headers["content-type"] != "text/event-stream; charset=utf-8":
        return response.status_code, [response.json()]
    events = response.text.split("\n\n")
    assert events.pop() == ""
    if events[-1] == "data: [DONE]":
        events.pop()
    return response.status_code, [json.loads(event.removeprefix("data: ")) for event in events]
