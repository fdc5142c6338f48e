"""The Ray Serve application: ingresses that read requests, and engines that answer them.

    serve run pipelines.serving.app:build_app checkpoint=outputs/instruct/export

Everything that can be wrong with a request is found in an ingress, which has no model; engines get prompts.

Whoever only starts the application imports this module too, and stays for as long as it runs: the model's libraries,
which take seconds and hundreds of megabytes, are imported by the replicas.
"""

# No "from __future__ import annotations" here: Serve reads build_app's annotation to validate the `args:` of a file.
import asyncio
import logging
import os
from collections.abc import AsyncIterator
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig
from ray.serve.handle import DeploymentHandle

from pipelines.serving.checkpoint_files import check_folder, checkpoint_identity
from pipelines.serving.settings import ServeArgs
from pipelines.serving.single_flight import SingleFlight
from pipelines.storage import resolve

if TYPE_CHECKING:
    from fastapi import FastAPI
    from prometheus_client import Metric

    from pipelines.serving.engine import Prompt
    from pipelines.serving.errors import ApiError
    from pipelines.serving.replies import Reply

logger = logging.getLogger("ray.serve")

METRICS_TIMEOUT_S = 5
# Of one replica. Ingress and engine turn requests away themselves, at once; what Serve held back instead would wait
# without a bound or a deadline, and whoever looks after the replica, as /health does, would wait behind it.
MOST_CONNECTIONS = 10_000


class EngineReplica:
    """One model."""

    def __init__(self, args: ServeArgs) -> None:
        from transformers.utils.logging import disable_progress_bar

        from pipelines.serving.engine import Engine
        from pipelines.serving.metrics import EngineMetrics
        from pipelines.serving.replies import Desk

        disable_progress_bar()
        engine = Engine.from_checkpoint(args.checkpoint, args.device, args.dtype, args.engine)
        self._engine = engine
        self._desk = Desk(engine)
        self._metrics = EngineMetrics(_replica_name())
        self._check = SingleFlight(lambda: asyncio.to_thread(engine.check, args.wedged_after_s))

    async def answer(self, prompt: "Prompt") -> "Reply | ApiError":
        """The whole answer, or why there is none. Refusals are values: Serve would log an exception with its trace."""
        return await self._desk.answer(prompt)

    async def stream(self, prompt: "Prompt") -> "AsyncIterator[Reply | ApiError]":
        """The answer as it comes, or why it ends."""
        async for reply in self._desk.stream(prompt):
            yield reply

    async def collect(self) -> "list[Metric]":
        """What it does."""
        return self._metrics.collect(self._engine.stats())

    async def check_health(self) -> None:
        """Called by Serve every few seconds, and for `GET /health`; a replica that raises thrice is replaced.

        One that is stuck ends at once. Serve would let its requests finish first, which they never do; so they are
        asked of another engine. All who ask at once share a look, and a thread: Serve must not wait behind the others.
        """
        from pipelines.serving.engine import EngineStuck

        try:
            await self._check()
        except EngineStuck:
            logger.exception("this engine is stuck; its process ends, to be replaced")
            os._exit(1)

    def __del__(self) -> None:
        """Called by Serve when the replica has let go of its last request."""
        if hasattr(self, "_engine"):
            self._engine.close()


class Ingress:
    """HTTP in front of the engines."""

    def __init__(self, args: ServeArgs, model_name: str, engines: DeploymentHandle) -> None:
        from pipelines.serving.checkpoint import load_processor
        from pipelines.serving.engine import Encoder
        from pipelines.serving.engines import RemoteEngines
        from pipelines.serving.metrics import IngressMetrics
        from pipelines.serving.service import Service

        self._policy = args.policy
        self._is_configured = False
        self._metrics = IngressMetrics(_replica_name())
        several = max(args.num_replicas, args.max_replicas or 1) > 1
        self._engines = RemoteEngines(engines, self._metrics.retried, several)
        encoder = Encoder(load_processor(args.checkpoint))
        model_hash = checkpoint_identity(args.checkpoint)
        self._service = Service(
            model_name, encoder, self._engines, self._metrics, self._policy, self._read_metrics, model_hash
        )

    def __serve_build_asgi_app__(self) -> "FastAPI":
        """Called by Serve in the replica."""
        from pipelines.serving.http import build_http

        return build_http(self._service)

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Called by Serve at the start and whenever `user_config` has changed: fields of `Policy`.

        A running ingress stays with the policy that it has where the new one is wrong: Serve would replace one that
        raises by another one that raises as well.

        Raises:
            ValueError: as `Policy.changed`, at the start, in a line: `serve status` shows it.
        """
        try:
            policy = self._policy.changed(user_config)
        except ValueError as error:
            if not self._is_configured:
                raise ValueError(f"user_config is refused: {_faults(error)}") from None
            logger.error("user_config is refused and changes nothing; no ingress can start with it: %s", _faults(error))
            return
        self._service.adopt(policy)
        self._is_configured = True

    async def collect(self) -> "list[Metric]":
        """What it has seen."""
        return self._metrics.collect()

    async def _read_metrics(self) -> bytes:
        from pipelines.serving.engines import collect_from
        from pipelines.serving.metrics import exposition

        context = serve.get_replica_context()
        ingresses = serve.get_deployment_handle(context.deployment, context.app_name)
        seen, done = await asyncio.gather(
            collect_from(ingresses, METRICS_TIMEOUT_S), self._engines.collect(METRICS_TIMEOUT_S)
        )
        return exposition([*seen, *done])


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
        "graceful_shutdown_timeout_s": args.drain_s,
        "health_check_period_s": args.health_check_period_s,
        "health_check_timeout_s": args.health_check_timeout_s,
    }
    engine = serve.deployment(
        name="Engine",
        ray_actor_options={"num_cpus": args.num_cpus, "num_gpus": args.num_gpus},
        max_ongoing_requests=MOST_CONNECTIONS,
        **_num_engines(args),
        **common,
    )(EngineReplica).bind(args)
    return serve.deployment(
        name="Ingress",
        num_replicas=args.num_ingress_replicas,
        ray_actor_options={"num_cpus": args.ingress_num_cpus},
        max_ongoing_requests=MOST_CONNECTIONS,
        max_queued_requests=MOST_CONNECTIONS,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        user_config={},
        **common,
    )(serve.ingress()(Ingress)).bind(args, model_name, engine)


def _num_engines(args: ServeArgs) -> dict[str, Any]:
    if args.max_replicas is None or args.max_replicas == args.num_replicas:
        return {"num_replicas": args.num_replicas}
    autoscaling = AutoscalingConfig(
        min_replicas=args.num_replicas,
        max_replicas=args.max_replicas,
        # Counts what runs and what waits: beyond its slots, an engine has a queue, which fills before it refuses.
        target_ongoing_requests=args.engine.max_slots,
        upscale_delay_s=args.upscale_delay_s,
        downscale_delay_s=args.downscale_delay_s,
    )
    return {"autoscaling_config": autoscaling}


def _faults(error: ValueError) -> str:
    """In a line."""
    if not isinstance(error, ValidationError):
        return str(error)
    return "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())


def _replica_name() -> str:
    return serve.get_replica_context().replica_id.unique_id
