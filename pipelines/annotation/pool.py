"""The Ray Data actor pool: chunks -> parts -> receipts. No row passes through the object store."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.data.context import AutoscalingConfig

from pipelines.annotation.ledger import PartReceipt
from pipelines.annotation.plan import AnnotationPlan
from pipelines.annotation.settings import AnnotateSettings
from pipelines.preparation.chunks import Chunk
from pipelines.preparation.row_images import SourceFiles
from pipelines.ray_tasks import CRASHES, WHOLE_BLOCK, carried, column, named, quiet_context

if TYPE_CHECKING:
    from pipelines.annotation.answering import Asker
    from pipelines.annotation.chunks import ChunkAnnotator

# One chunk is being answered, the next one asks as slots fall free, and a third stands by while Ray sends for a fourth.
_CHUNKS_PER_WORKER = 3
_SUSPECTS = 6  # chunks that are named where workers died of one


def run_chunks(
    plan: AnnotationPlan,
    pending: Mapping[int, int],
    files: tuple[SourceFiles, ...],
    output: str,
    settings: AnnotateSettings,
    token: str,
) -> Iterator[PartReceipt]:
    """Carry out the chunks `pending` of `plan`; their receipts, uncommitted, as they are done, in any order.

    Args:
        plan: the plan.
        pending: number of a chunk -> its attempt.
        files: where any process finds each source.
        output: where the parts go.
        settings: of the workers.
        token: for the endpoint.

    Raises:
        what a worker raised, without Ray's wrapping: PlanError, CheckpointError, EndpointError, OSError, ...
        ClusterError: Ray itself failed.
        CrashError: workers died of a chunk; it names those that it may be.
    """
    items = [
        {"number": number, "attempt": attempt, **plan.chunks[number].model_dump()}
        for number, attempt in pending.items()
    ]
    context = quiet_context()
    # Ray adds a worker where the others hold 1.75 times the chunks that they run at once. Ours run all that they hold.
    context.autoscaling_config = AutoscalingConfig(actor_pool_util_upscaling_threshold=1.0)
    # A chain has no other place for `max_task_retries`.
    with DataContext.current(context), warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        chunks = ray.data.from_items(items, override_num_blocks=len(items))
        receipts = chunks.map_batches(
            AnnotationWorker,
            fn_constructor_args=(plan.identity(), plan.terms, files, output, settings, token),
            **WHOLE_BLOCK,
            **_actors(settings),
        )
    done = map(PartReceipt.model_validate_json, column(receipts, "receipt"))
    return named(done, list(pending), partial(_suspects, plan))


def _suspects(plan: AnnotationPlan, left: list[int]) -> str:
    """Of which chunks workers may have died: each worker has several under way."""
    chunks = [plan.chunks[number] for number in left[:_SUSPECTS]]
    rows = [
        f"'{plan.terms.sources[chunk.source].name}' from row {chunk.first_row} (line {chunk.first_line}) on"
        for chunk in chunks
    ]
    return (
        f"workers die of a row, likely in one of these chunks of {chunks[0].rows} rows: {', '.join(rows)}. It may take "
        "more memory than a worker has; to learn which it is, annotate into another output with chunk_rows: 1. What is "
        "done is kept"
    )


class AnnotationWorker:
    """An actor of the pool: one asker, several chunks under way."""

    def __init__(
        self,
        plan_identity: str,
        terms: Any,
        files: tuple[SourceFiles, ...],
        output: str,
        settings: AnnotateSettings,
        token: str,
    ) -> None:
        # Not above: the driver, which imports this module too, needs nothing of the model's libraries.
        from pipelines.annotation.chunks import ChunkAnnotator

        def load() -> ChunkAnnotator:
            return ChunkAnnotator(plan_identity, terms, files, output, make_asker(settings, terms.model, token))

        # Not yet: Ray would wrap what an actor's birth raises, such as that the checkpoint does not load.
        self._load = load
        self._annotator: ChunkAnnotator | None = None
        self._loading = threading.Lock()

    @carried
    def __call__(self, chunks: pa.Table) -> pa.Table:
        """Chunks, of which Ray hands in one, -> their receipts as JSON. Ray calls this from several threads."""
        with self._loading:
            self._annotator = self._annotator or self._load()
        receipts = []
        for row in chunks.to_pylist():
            number, attempt = row.pop("number"), row.pop("attempt")
            receipts.append(self._annotator(number, Chunk(**row), attempt).model_dump_json())
        return pa.table({"receipt": receipts})


def make_asker(settings: AnnotateSettings, model: str, token: str) -> Asker:
    """Who answers, in this process.

    Raises:
        CheckpointError: the checkpoint cannot be served.
        ValueError: the engine's budgets leave no room for a slot, or its slots none for a question beside an answer.
    """
    if settings.endpoint:
        from pipelines.annotation.endpoint import EndpointAsker

        return EndpointAsker(settings.endpoint, model.partition(":")[2], token)
    import torch
    from transformers.utils.logging import disable_progress_bar

    from pipelines.annotation.answering import AHEAD, EngineAsker
    from pipelines.serving.engine import Engine

    assert settings.checkpoint is not None
    disable_progress_bar()
    torch.set_num_threads(max(1, int(settings.workers.num_cpus)))
    slots = settings.engine.max_slots
    # The asker itself keeps the queue short; the engine must only never refuse.
    budgets = settings.engine.model_copy(update={"max_waiting": max(settings.engine.max_waiting, AHEAD * slots)})
    engine = Engine.from_checkpoint(settings.checkpoint, settings.device, settings.dtype, budgets)
    if settings.max_tokens >= engine.max_length:  # each row would be refused for it
        raise ValueError(
            f"max_tokens is {settings.max_tokens}, and a slot of the engine holds {engine.max_length} tokens, the "
            "question's among them: lower max_tokens, or raise engine.max_length"
        )
    return EngineAsker(engine)


def _actors(settings: AnnotateSettings) -> dict[str, Any]:
    workers = settings.workers
    num_gpus = 0 if settings.endpoint or settings.device == "cpu" else ray.cluster_resources().get("GPU", 0)
    share = {"num_gpus": workers.num_gpus} if num_gpus else {}
    pool = ActorPoolStrategy(
        min_size=workers.min_workers,
        max_size=workers.most(num_gpus),
        max_tasks_in_flight_per_actor=_CHUNKS_PER_WORKER,
        max_concurrent_calls_per_actor=_CHUNKS_PER_WORKER,
        enable_true_multi_threading=True,
    )
    return {"compute": pool, "max_task_retries": CRASHES, "num_cpus": workers.num_cpus, **share}
