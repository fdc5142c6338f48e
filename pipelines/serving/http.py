"""The HTTP surface: routes, tokens, body limit and error shapes, around a `Service`."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import re
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import Receive, Scope, Send

from pipelines.serving.completions import Completion
from pipelines.serving.errors import ApiError, shown, unknown_model
from pipelines.serving.replies import Reply
from pipelines.serving.service import CLIENT_GONE, Question, Service, Visit
from pipelines.serving.settings import Limits

PAGE = Path(__file__).with_name("page.html")
# A reverse proxy that gathers what it passes on would make the stream come in one piece.
STREAM_HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}
# An order to Serve's own proxy: an answer would be made to its end for a client that has gone. HAProxy takes it away.
STAYS = "x-request-disconnect-disabled"
PLAIN_ID = re.compile("[A-Za-z0-9._:-]{1,128}")  # as in `haproxy`, which stands before it on a machine of our own


def build_http(service: Service) -> FastAPI:
    """The FastAPI application over `service`."""
    # No redirects to a path without its last slash: they would name the scheme that a proxy speaks with us, plain HTTP.
    http = FastAPI(title="FlashSloth", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    created = int(time.time())
    page = PAGE.read_text(encoding="utf-8")
    page_headers = _page_headers(page)

    @http.exception_handler(ApiError)
    async def answer_error(_: Request, error: ApiError) -> JSONResponse:
        return JSONResponse(error.body(), status_code=error.status, headers=error.headers())

    @http.exception_handler(HTTPException)
    async def answer_wrong_path(request: Request, error: HTTPException) -> JSONResponse:
        message = f"{request.method} {shown(request.url.path)}: {error.detail}"
        response = await answer_error(request, ApiError(error.status_code, message, "invalid_request"))
        response.headers.update(error.headers or {})  # of a wrong method: which ones are allowed
        return response

    @http.exception_handler(Exception)
    async def answer_fault(request: Request, _: Exception) -> JSONResponse:
        return await answer_error(request, ApiError(500, "internal error", "internal_error"))  # Serve logs what it was

    async def chat(request: Request) -> Response:
        try:
            visit = service.enter(_client_of(request, service))
        except ApiError as error:
            service.metrics.turned_away(error.status)
            raise
        async with visit.closed_on_error():
            if STAYS in request.headers:
                raise ApiError(422, f"the header {STAYS} is not supported", "invalid_request")
            body = await _read_body(request, visit, service.limits)
            # In time, too: a reader may be busy with somebody else's picture, and what waits for it holds its body.
            question = await visit.wait(service.read(body, visit.hold))
            request_id = _id_of(request)
            num_prompt_tokens = len(question.prompt.input_ids)
            completion = Completion(
                request_id, service.model_name, service.model_hash, num_prompt_tokens, question.include_usage
            )
            visit.sent()
            if question.is_stream:
                return await _stream(service, visit, question, completion)
            reply = await visit.wait(service.engines.answer(question.prompt))
            visit.first_token(reply)
            service.metrics.answered(num_prompt_tokens, reply.num_tokens)
            visit.close(200)
            return JSONResponse(completion.whole(reply))

    # A plain route: of what FastAPI's own would do around each request, nothing is needed here.
    http.add_route("/v1/chat/completions", chat, methods=["POST"])

    def describe() -> dict[str, Any]:
        common = {"object": "model", "created": created, "owned_by": "flashsloth"}
        return {"id": service.model_name, **common, "tiling": service.tiling, "hash": service.model_hash}

    # Whoever looks whether a service is there often asks by HEAD.
    @http.api_route("/v1/models", methods=["GET", "HEAD"])
    async def models(request: Request) -> dict[str, Any]:
        _client_of(request, service)
        return {"object": "list", "data": [describe()]}

    @http.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> dict[str, Any]:
        _client_of(request, service)
        if name != service.model_name:
            raise unknown_model(name, service.model_name)
        return describe()

    @http.get("/metrics")
    async def metrics(request: Request) -> Response:
        _client_of(request, service)
        return Response(await service.read_metrics(), media_type="text/plain; version=0.0.4")

    @http.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> dict[str, str]:
        await service.check()
        return {"status": "ok"}

    @http.api_route("/", methods=["GET", "HEAD"])
    async def show_page() -> HTMLResponse:
        return HTMLResponse(page, headers=page_headers)

    return http


async def _stream(service: Service, visit: Visit, question: Question, completion: Completion) -> Response:
    """The response that sends the answer as it comes. What goes wrong before its first text has its own status."""
    replies = service.engines.stream(question.prompt)
    try:
        first = await visit.wait(anext(replies))
    except BaseException:
        await replies.aclose()  # type: ignore[attr-defined]  # a generator, which ends the request with it
        raise
    visit.first_token(first)
    return _EventStream(_events(service, visit, question, completion, first, replies), visit, replies)


class _EventStream(StreamingResponse):
    """Sends events. Lets go of the request behind them however it ends: who leaves early lets none of them begin."""

    def __init__(self, events: AsyncIterator[bytes], visit: Visit, replies: AsyncIterator[Reply]) -> None:
        super().__init__(events, media_type="text/event-stream", headers=STREAM_HEADERS)
        self._visit = visit
        self._replies = replies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See `Response`."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._visit.close(CLIENT_GONE)  # without effect on one that was closed by its last event
            await self._replies.aclose()  # type: ignore[attr-defined]


async def _events(
    service: Service,
    visit: Visit,
    question: Question,
    completion: Completion,
    reply: Reply,
    replies: AsyncIterator[Reply],
) -> AsyncIterator[bytes]:
    num_tokens = reply.num_tokens
    try:
        yield completion.opening() + completion.piece(reply)
        while reply.finish_reason is None:
            reply = await visit.wait(anext(replies))
            num_tokens += reply.num_tokens
            if reply.text or reply.finish_reason is not None:
                yield completion.piece(reply)
        service.metrics.answered(len(question.prompt.input_ids), num_tokens)
        visit.close(200)
        yield completion.closing(num_tokens)
    except ApiError as error:
        visit.close(error.status)
        yield completion.broken(error)


def _client_of(request: Request, service: Service) -> str:
    address = request.client.host if request.client else "unknown"
    return service.clients.authenticate(request.headers.get("authorization"), address)


def _id_of(request: Request) -> str:
    """Serve's proxy gives every request an id, the client's own where it sent one, and returns it as a header."""
    request_id = request.headers.get("x-request-id", "")
    return request_id if PLAIN_ID.fullmatch(request_id) else uuid.uuid4().hex


async def _read_body(request: Request, visit: Visit, limits: Limits) -> bytes:
    """The body, never more of it than the limits allow, nor longer than an answer may take."""
    limit = limits.max_body_bytes
    too_large = ApiError(413, f"the body is larger than {limit} bytes", "body_too_large")
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":  # nothing is unpacked: a few bytes could become gigabytes
        raise ApiError(
            415, f"the body is compressed ({encoding[:20]}), which is not read; send it as it is", "compressed"
        )
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout_at(visit.expires_at):
            async for chunk in request.stream():
                if len(body) + len(chunk) > limit:
                    raise too_large
                visit.hold(len(chunk))
                body += chunk
    except TimeoutError as error:
        message = f"the body did not come within {limits.deadline_s:g} s"
        raise ApiError(408, message, "body_too_slow") from error
    except ClientDisconnect as error:
        raise ApiError(CLIENT_GONE, "the connection ended before the body did", "client_gone") from error
    return bytes(body)  # of a bytearray, the parser would make a copy of its own


def _page_headers(page: str) -> dict[str, str]:
    """Let the page run its own script and style, show pictures that it was given, and talk to nobody but us."""
    rules = ["default-src 'none'", "connect-src 'self'", "img-src data: blob:", "base-uri 'none'", "form-action 'none'"]
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        rules.append(f"{tag}-src 'sha256-{digest}'")
    rules.append("frame-ancestors 'none'")
    headers = {"content-security-policy": "; ".join(rules), "x-content-type-options": "nosniff"}
    return {**headers, "referrer-policy": "no-referrer", "cache-control": "no-cache"}
