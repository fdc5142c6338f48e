"""The Ray Data chain: chunks -> samples -> (features) -> shards -> receipts. One block is one chunk all the way.

Without a tower Ray fuses the steps into one task per chunk, so no sample passes through the object store.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, ParamSpec

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayTaskError

from flashsloth import FlashSlothProcessor
from pipelines.encode import PatchEncoder
from pipelines.preparation.facts import chunk_facts
from pipelines.preparation.plan import Chunk, Plan, Terms
from pipelines.preparation.samples import SampleMaker, SourceFiles
from pipelines.preparation.settings import EncoderSettings
from pipelines.shards.receipts import QuarantinedRow, Receipt, account
from pipelines.shards.schema import QUARANTINE_SCHEMA, SAMPLE_SCHEMA
from pipelines.shards.writer import write_shard

_EXAMPLES = 12  # thumbnails in the data receipt, about
_LOUD_LOGGERS = ("exceptions", "_internal.execution.streaming_executor_state", "_internal.progress")


Step = ParamSpec("Step")


@dataclass(frozen=True)
class Work:
    """What every task must know. Paths are such as any process can read."""

    plan_identity: str
    terms: Terms
    files: tuple[SourceFiles, ...]
    output: str
    processor: ray.ObjectRef
    """The processor itself, which a worker fetches once: its path need not exist on the other machines."""
    example_every: int = 1
    """Of every so many chunks, one gives a thumbnail."""


def run_chunks(
    plan: Plan,
    pending: list[int],
    files: tuple[SourceFiles, ...],
    output: str,
    processor: FlashSlothProcessor,
    encoder: EncoderSettings | None,
) -> Iterator[Receipt]:
    """Carry out the chunks `pending` of `plan`; yields their receipts, uncommitted, as they are done, in any order.

    Raises:
        what a task raised, without Ray's wrapping: PlanError, AccountingError, OSError, ...
    """
    example_every = max(1, len(plan.chunks) // _EXAMPLES)
    work = Work(plan.identity(), plan.terms, files, output, ray.put(processor), example_every)
    items = [{"number": number, **plan.chunks[number].model_dump()} for number in pending]
    whole_block: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
    with DataContext.current(_context()):
        chunks = ray.data.from_items(items, override_num_blocks=len(items))
        samples = chunks.map_batches(partial(make_samples, work=work), **whole_block)
        if encoder:
            samples = samples.map_batches(
                FeatureActor, fn_constructor_args=(encoder,), **whole_block, **_actors(encoder)
            )
        receipts = samples.map_batches(partial(write_chunk, work=work), **whole_block)
    try:
        for batch in receipts.iter_batches(batch_size=None, batch_format="pyarrow"):
            yield from (Receipt.model_validate_json(text) for text in batch["receipt"].to_pylist())
    except RayTaskError as error:
        raise _original(error) from error


class _Carrier(Exception):
    """Brings what a task raised to the driver as it is: Ray Data writes advice for its users into the first text."""


def _carried(step: Callable[Step, pa.Table]) -> Callable[Step, pa.Table]:
    @wraps(step)
    def run(*args: Step.args, **kwargs: Step.kwargs) -> pa.Table:
        try:
            return step(*args, **kwargs)
        except Exception as error:
            raise _Carrier(error) from error

    return run


def _original(error: RayTaskError) -> BaseException:
    return error.cause.args[0] if isinstance(error.cause, _Carrier) else error


@_carried
def make_samples(chunks: pa.Table, work: Work) -> pa.Table:
    """Chunks, of which Ray hands in one, -> their samples (columns: WORK_SCHEMA)."""
    tables = []
    for row in chunks.to_pylist():
        number = row.pop("number")
        tables.append(_maker(work)(number, Chunk(**row)))
    return pa.concat_tables(tables)


class FeatureActor:
    """Samples with pixels -> samples with features. Holds the tower."""

    def __init__(self, encoder: EncoderSettings) -> None:
        self.encoder = PatchEncoder(encoder.path, encoder.batch_size)

    @_carried
    def __call__(self, samples: pa.Table) -> pa.Table:
        """Replace the pixels of `samples`; a row whose features are not finite gets the reason `non_finite`."""
        rows = [row for row, has in enumerate(samples["image"].is_valid().to_pylist()) if has]
        if not rows:
            return samples
        changed = ("image", "image_shape", "image_dtype", "reason", "detail", "encode_seconds")
        columns = {name: samples[name].to_pylist() for name in changed}
        pixels = [np.frombuffer(columns["image"][row], np.uint8).reshape(columns["image_shape"][row]) for row in rows]
        start = time.perf_counter()
        encoded = self.encoder(np.stack(pixels))
        seconds = (time.perf_counter() - start) / len(rows)
        for row, features in zip(rows, encoded, strict=True):
            columns["encode_seconds"][row] = seconds
            columns["image"][row] = features.tobytes()
            columns["image_shape"][row], columns["image_dtype"][row] = list(features.shape), str(features.dtype)
            if not np.isfinite(features).all():
                columns["reason"][row] = "non_finite"
                columns["detail"][row] = f"{np.count_nonzero(~np.isfinite(features))} of {features.size} features"
        for name, values in columns.items():
            field = samples.schema.field(name)
            samples = samples.set_column(samples.schema.get_field_index(name), field, pa.array(values, field.type))
        return samples


@_carried
def write_chunk(samples: pa.Table, work: Work) -> pa.Table:
    """The samples of one chunk -> its shard, written, and its receipt as JSON."""
    bad = samples["reason"].is_valid()
    good = samples.filter(pc.invert(bad)) if pc.any(bad).as_py() else samples  # a filter copies every image
    good = good.select(SAMPLE_SCHEMA.names).cast(SAMPLE_SCHEMA)
    rejected = samples.filter(bad).select(QUARANTINE_SCHEMA.names)
    account(samples["key"].to_pylist(), good["key"].to_pylist(), rejected["key"].to_pylist())
    start = time.perf_counter()
    shard = write_shard(work.output, good) if good.num_rows else None
    receipt = Receipt(
        plan=work.plan_identity,
        chunk=samples["chunk"][0].as_py(),
        planned=samples.num_rows,
        shard=shard,
        quarantined=[QuarantinedRow(**row) for row in rejected.to_pylist()],
        facts=chunk_facts(samples, time.perf_counter() - start),
    )
    return pa.table({"receipt": [receipt.model_dump_json()]})


# A worker process runs many chunks: it unpacks the processor (a large tokenizer) once.
_MAKERS: dict[tuple[str, tuple[SourceFiles, ...]], SampleMaker] = {}


def _maker(work: Work) -> SampleMaker:
    key = (work.plan_identity, work.files)
    if key not in _MAKERS:
        # A task has one CPU. Threads for the few short texts of a conversation cost more than the texts.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        _MAKERS.clear()
        _MAKERS[key] = SampleMaker(work.terms, work.files, ray.get(work.processor), work.example_every)
    return _MAKERS[key]


def _context() -> DataContext:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Ray's own old settings, which a copy touches
        context = DataContext.get_current().copy()
    context.target_max_block_size = None  # a chunk must come out as one block, whatever its images weigh
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # What a task raises is ours to report, in one line; Ray Data would log it three times and ask for a bug report.
    context.raise_original_map_exception = True
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    for name in _LOUD_LOGGERS:
        logging.getLogger(f"ray.data.{name}").setLevel(logging.CRITICAL)
    return context


def _actors(encoder: EncoderSettings) -> dict[str, Any]:
    num_gpus = ray.cluster_resources().get("GPU", 0)
    workers = encoder.workers or max(1, int(num_gpus / encoder.num_gpus))
    share = {"num_gpus": encoder.num_gpus} if num_gpus else {"num_cpus": 1}
    return {"compute": ActorPoolStrategy(size=workers), **share}
