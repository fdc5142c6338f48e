"""The HTTP surface: routes, body limit and error shapes, around anything that turns prompts into answers."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from flashsloth.conversation import ConversationError
from pipelines.serving.engine import Answer, Encoder, Prompt
from pipelines.serving.protocol import (
    ApiError,
    completion,
    parse_request,
    read_messages,
    read_sampling,
    unknown_model,
)
from pipelines.serving.settings import Limits

HEALTH_TIMEOUT_S = 10


@dataclass
class Service:
    """What stands behind the routes.

    Attributes:
        model_name: under which clients ask for the model.
        limits: what a request may ask for.
        encoder: turns conversations into prompts.
        answer: answers one prompt, or returns or raises an `ApiError`.
        check: raises where no engine answers.
    """

    model_name: str
    limits: Limits
    encoder: Encoder
    answer: Callable[[Prompt], Awaitable[Answer | ApiError]]
    check: Callable[[], Awaitable[None]]

    def prepare(self, body: bytes) -> Prompt:
        """Check a request and encode it; raises `ApiError` for whatever is wrong with it."""
        request = parse_request(body, self.model_name)
        sampling = read_sampling(request, self.limits)
        messages, image = read_messages(request, self.limits)
        try:
            return self.encoder.prompt(messages, image, sampling, max_length=self.limits.max_prompt_tokens)
        except ConversationError as error:
            raise ApiError(422, error.detail, error.reason, "messages") from error


def build_http(service: Service) -> FastAPI:
    """The FastAPI application over `service`."""
    http = FastAPI(title="FlashSloth", docs_url=None, redoc_url=None, openapi_url=None)
    created = int(time.time())

    @http.exception_handler(ApiError)
    async def answer_error(_: Request, error: ApiError) -> JSONResponse:
        headers = {"retry-after": "1"} if error.status in (429, 503) else None
        return JSONResponse(error.body(), status_code=error.status, headers=headers)

    @http.exception_handler(HTTPException)
    async def answer_wrong_path(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return await answer_error(request, ApiError(error.status_code, message, "invalid_request"))

    @http.exception_handler(Exception)
    async def answer_fault(request: Request, _: Exception) -> JSONResponse:
        return await answer_error(request, ApiError(500, "internal error", "internal_error"))  # Serve logs what it was

    @http.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        body = await _read_body(request, service.limits.max_body_bytes)
        # In a thread: decoding an image may take a second, and others want to be heard meanwhile.
        prompt = await asyncio.to_thread(service.prepare, body)
        answer = await service.answer(prompt)
        if isinstance(answer, ApiError):
            raise answer
        # Serve's proxy gives every request an id, the client's own where it sent one, and returns it as a header.
        request_id = request.headers.get("x-request-id") or uuid.uuid4().hex
        return JSONResponse(completion(request_id, service.model_name, prompt, answer))

    def describe() -> dict[str, Any]:
        return {"id": service.model_name, "object": "model", "created": created, "owned_by": "flashsloth"}

    @http.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [describe()]}

    @http.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        if name != service.model_name:
            raise unknown_model(name, service.model_name)
        return describe()

    @http.get("/health")
    async def health() -> dict[str, str]:
        try:
            await asyncio.wait_for(service.check(), HEALTH_TIMEOUT_S)
        except Exception as error:  # whatever keeps the engine from answering: that is the finding
            raise ApiError(503, f"the engine does not answer ({type(error).__name__})", "unavailable") from error
        return {"status": "ok"}

    return http


async def _read_body(request: Request, limit: int) -> bytes:
    """The body, never more than `limit` bytes of it."""
    too_large = ApiError(413, f"the body is larger than {limit} bytes", "body_too_large")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)
