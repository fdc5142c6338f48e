"""Ray Serve by itself: an ingress and an engine that answers at once. What is left then is not ours to save.

No picture is decoded and no token is made: the ingress reads a request's body and asks the engine, which has its answer
ready. The proxy, HTTP and the messages between the processes are those of our service (`pipelines.serving.transport`).
"""

# No "from __future__ import annotations" here: Serve reads annotations.
from collections.abc import AsyncIterator

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from pipelines.serving.app import MOST_CONNECTIONS
from pipelines.serving.completions import Completion
from pipelines.serving.http import STREAM_HEADERS
from pipelines.serving.replies import Reply
from pipelines.serving.settings import ServeArgs


class ReadyEngine:
    """Has every answer ready."""

    async def answer(self, max_tokens: int) -> Reply:
        """An answer of so many tokens."""
        return Reply("word " * max_tokens, max_tokens, "length")

    async def stream(self, max_tokens: int) -> AsyncIterator[Reply]:
        """The same, the first token by itself."""
        yield Reply("word", 1)
        yield Reply(" word" * (max_tokens - 1), max_tokens - 1, "length")


class PlainIngress:
    """Answers as our service does, to requests that it does not look at."""

    def __init__(self, engine: DeploymentHandle, max_tokens: int) -> None:
        self._answers = engine.options(_by_reference=False).answer
        self._streams = engine.options(_by_reference=False, stream=True).stream
        self._max_tokens = max_tokens

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve in the replica."""
        http = FastAPI()
        http.add_route("/v1/chat/completions", self._answer, methods=["POST"])
        http.add_route("/stream/v1/chat/completions", self._stream, methods=["POST"])
        return http

    async def _answer(self, request: Request) -> Response:
        await request.body()
        return JSONResponse(_completion().whole(await self._answers.remote(self._max_tokens)))

    async def _stream(self, request: Request) -> Response:
        await request.body()
        return StreamingResponse(self._events(), media_type="text/event-stream", headers=STREAM_HEADERS)

    async def _events(self) -> AsyncIterator[bytes]:
        completion = _completion()
        yield completion.opening()
        async for reply in self._streams.remote(self._max_tokens):
            yield completion.piece(reply)
        yield completion.closing(self._max_tokens)


def build_plain_app(args: ServeArgs, max_tokens: int) -> Application:
    """The application, whose answers have `max_tokens` tokens."""
    engine = serve.deployment(
        name="ReadyEngine", ray_actor_options={"num_cpus": args.num_cpus}, max_ongoing_requests=MOST_CONNECTIONS
    )(ReadyEngine).bind()
    return serve.deployment(
        name="PlainIngress",
        ray_actor_options={"num_cpus": args.ingress_num_cpus},
        max_ongoing_requests=MOST_CONNECTIONS,
    )(serve.ingress()(PlainIngress)).bind(engine, max_tokens)


def _completion() -> Completion:
    return Completion("0", "plain", "0" * 64, num_prompt_tokens=0, include_usage=False)
