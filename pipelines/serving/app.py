"""The Ray Serve application: an ingress that checks requests, and engines that answer them in batches.

    serve run pipelines.serving.app:build_app checkpoint=outputs/instruct/export

Everything that can be wrong with a request is found in the ingress, before batching: what Serve batches fails
together, and one bad image must not take seven good requests with it.
"""

# No "from __future__ import annotations" here: Serve reads build_app's annotation to validate the `args:` of a file.
import asyncio
import logging
from pathlib import PurePosixPath
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve import Application
from ray.serve.config import BackpressureConfig
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle
from transformers.utils.logging import disable_progress_bar

from pipelines.serving.checkpoint import check_folder, load_processor
from pipelines.serving.engine import Answer, Encoder, Engine, Prompt
from pipelines.serving.http import Service, build_http
from pipelines.serving.protocol import ApiError
from pipelines.serving.settings import ServeArgs
from pipelines.storage import resolve

logger = logging.getLogger("ray.serve")

SLOWEST_ANSWER_S = 120  # what a shutdown waits for answers that are under way


class EngineWorker:
    """One model. Requests that arrive together are answered together."""

    def __init__(self, args: ServeArgs) -> None:
        disable_progress_bar()
        self.engine = Engine.from_checkpoint(args.checkpoint, args.device, args.dtype)
        batching: Any = self.answer  # the decorator below adds the setters
        batching.set_max_batch_size(args.max_batch_size)
        batching.set_batch_wait_timeout_s(args.batch_wait_timeout_s)

    @serve.batch
    async def answer(self, prompts: list[Prompt]) -> list[Answer | ApiError]:
        """Answer a batch. Never raises: Serve would hand the exception to every request in it."""
        return await asyncio.to_thread(self._answer_each, prompts)

    async def check_health(self) -> None:
        """Called by Serve every few seconds; a replica that raises is replaced."""
        await asyncio.to_thread(self.engine.check)

    def _answer_each(self, prompts: list[Prompt]) -> list[Answer | ApiError]:
        try:
            return list(self.engine.generate(prompts))
        except Exception:
            logger.exception("a batch of %d requests failed", len(prompts))
        if len(prompts) == 1:
            return [ApiError(500, "the engine could not answer this request", "engine_error")]
        # The guilty one fails alone.
        return [answer for prompt in prompts for answer in self._answer_each([prompt])]


class Ingress:
    """HTTP in front of the engines."""

    def __init__(self, args: ServeArgs, model_name: str, engine: DeploymentHandle) -> None:
        self.engine = engine
        encoder = Encoder(load_processor(args.checkpoint))
        self.service = Service(model_name, args.limits, encoder, self._answer, self._check)

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Serve in the replica."""
        return build_http(self.service)

    async def _answer(self, prompt: Prompt) -> Answer | ApiError:
        try:
            return await self.engine.answer.remote(prompt)
        except BackPressureError as error:
            raise ApiError(429, "too many requests are waiting; try again", "overloaded") from error
        except RayServeException as error:
            raise ApiError(503, "no engine can answer at the moment", "unavailable") from error

    async def _check(self) -> None:
        await self.engine.check_health.remote()


def build_app(args: ServeArgs) -> Application:
    """The application, as `serve.run` takes it and `import_path` of a Serve file names it.

    Raises:
        CheckpointError: the checkpoint cannot be served.
    """
    args = args.model_copy(update={"checkpoint": resolve(args.checkpoint)})
    check_folder(args.checkpoint)
    model_name = args.model_name or PurePosixPath(args.checkpoint).name
    common: dict[str, Any] = {
        "max_constructor_retry_count": 2,  # a checkpoint that does not load will not load the twentieth time either
        "graceful_shutdown_timeout_s": SLOWEST_ANSWER_S,
        "max_queued_requests": args.max_queued_requests,
        "backpressure_config": BackpressureConfig(status_code=429, retry_after_s=1),
    }
    engine = serve.deployment(
        name="Engine",
        num_replicas=args.num_replicas,
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        max_ongoing_requests=2 * args.max_batch_size,  # one batch is decoded, the next one gathers
        **common,
    )(EngineWorker).bind(args)
    # The engine's queue is the one that fills: /health must get in whatever waits there.
    capacity = args.num_replicas * 2 * args.max_batch_size + args.max_queued_requests
    return serve.deployment(
        name="Ingress",
        ray_actor_options={"num_cpus": 0.5},
        max_ongoing_requests=capacity + 16,
        **common,
    )(serve.ingress()(Ingress)).bind(args, model_name, engine)
