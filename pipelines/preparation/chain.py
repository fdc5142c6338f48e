"""The Ray Data chain: chunks -> samples -> (features) -> shards -> receipts. One block is one chunk all the way.

Without a tower a chunk is one step of one task, and an image is copied once: from where it was made into the shard.
"""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext
from ray.exceptions import RayError

from flashsloth import FlashSlothProcessor
from pipelines.encode import PatchEncoder
from pipelines.preparation.chunks import Chunk
from pipelines.preparation.facts import chunk_facts
from pipelines.preparation.features import with_features
from pipelines.preparation.image_pins import ImagePins
from pipelines.preparation.plan import Plan, Terms
from pipelines.preparation.row_images import SourceFiles
from pipelines.preparation.samples import SampleMaker
from pipelines.preparation.settings import EncoderSettings
from pipelines.ray_tasks import CRASHED, CRASHES, WHOLE_BLOCK, carried, column, named, quiet_context
from pipelines.shards.images import ImageStore
from pipelines.shards.receipts import QuarantinedRow, Receipt, account, keys_digest
from pipelines.shards.schema import IMAGE_SCHEMA, QUARANTINE_SCHEMA, SAMPLE_SCHEMA
from pipelines.shards.writer import write_shard

_TASK: dict[str, Any] = {"max_retries": CRASHES, **WHOLE_BLOCK}
_SUSPECTS = 16  # chunks that are looked at where workers died of one
_EXAMPLES = 12  # thumbnails in the data receipt, about
# From so many chunks to a CPU on, two tasks share one; before, to start more workers would take longer than they save.
_CHUNKS_TO_SHARE = 4


@dataclass(frozen=True)
class Work:
    """What every task must know. Paths are such as any process can read."""

    plan_identity: str
    terms: Terms
    files: tuple[SourceFiles, ...]
    output: str
    processor: ray.ObjectRef
    """The processor itself, which a worker fetches once: its path need not exist on the other machines."""
    pins: ray.ObjectRef | None = None
    """The plan's, which the workers of a machine share."""
    example_every: int = 1
    """Of every so many chunks, one gives a thumbnail."""


def run_chunks(
    plan: Plan,
    pending: list[int],
    files: tuple[SourceFiles, ...],
    output: str,
    processor: FlashSlothProcessor,
    encoder: EncoderSettings | None,
    pins: ImagePins | None,
) -> Iterator[Receipt]:
    """Carry out the chunks `pending` of `plan`; their receipts, uncommitted, as they are done, in any order.

    Raises:
        what a task raised, without Ray's wrapping: PlanError, EncoderError, AccountingError, OSError, ...
        ClusterError: Ray itself failed: its object store is full, its nodes are gone, ...
        CrashError: workers died of a chunk, which it names.
    """
    example_every = max(1, len(plan.chunks) // _EXAMPLES)
    held = ray.put(pins) if pins else None
    work = Work(plan.identity(), plan.terms, files, output, ray.put(processor), held, example_every)
    items = [{"number": number, **plan.chunks[number].model_dump()} for number in pending]
    # A chain has no other place for `max_retries`.
    with DataContext.current(quiet_context()), warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        chunks = ray.data.from_items(items, override_num_blocks=len(items))
        if encoder:
            samples = chunks.map_batches(partial(make_samples, work=work), **_TASK)
            samples = samples.map_batches(
                FeatureActor, fn_constructor_args=(encoder,), **WHOLE_BLOCK, **_actors(encoder)
            )
            receipts = samples.map_batches(partial(write_chunk, work=work), **_TASK)
        else:
            receipts = chunks.map_batches(partial(make_and_write, work=work), num_cpus=_cpus(len(items)), **_TASK)
    done = map(Receipt.model_validate_json, column(receipts, "receipt"))
    return named(done, pending, partial(_deadly, plan, work, encoder))


@carried
def make_samples(chunks: pa.Table, work: Work) -> pa.Table:
    """A block with one chunk -> its samples (columns: WORK_SCHEMA)."""
    [chunk] = chunks.to_pylist()
    return _maker(work)(chunk.pop("number"), Chunk(**chunk))


def make_and_write(chunks: pa.Table, work: Work) -> pa.Table:
    """A block with one chunk -> its receipt. Between two steps Ray Data would copy the images."""
    return write_chunk(make_samples(chunks, work), work)


def _deadly(plan: Plan, work: Work, encoder: EncoderSettings | None, left: list[int]) -> str | None:
    """Of which chunk workers died, found by making the first of `left` once more."""
    for number in left[:_SUSPECTS]:
        chunk = plan.chunks[number]
        if _is_deadly(chunk, number, work, encoder):
            source = plan.terms.sources[chunk.source]
            return (
                f"source '{source.name}': {source.path}: workers die of chunk {number}, {chunk.rows} rows from row "
                f"{chunk.first_row} (line {chunk.first_line}) on. A row of them may take more memory than a worker "
                "has; to learn which, prepare into another output with chunk_rows: 1. What is done is kept"
            )
    return None


def _is_deadly(chunk: Chunk, number: int, work: Work, encoder: EncoderSettings | None) -> bool:
    """Whether a worker dies of `chunk`, made once more and alone, and put through the tower where there is one."""
    tower = partial(FeatureActor, encoder) if encoder else None
    make = ray.remote(_make_only).options(max_retries=0, **(_share(encoder) if encoder else {}))
    try:
        ray.get(make.remote({"number": number, **chunk.model_dump()}, work, tower))
    except CRASHED:
        return True
    except RayError:  # a fault of another kind, which is not what is looked for
        return False
    return False


def _make_only(chunk: dict[str, int], work: Work, tower: Callable[[], FeatureActor] | None) -> None:
    samples = make_samples(pa.Table.from_pylist([chunk]), work)
    if tower:
        tower()(samples)


class FeatureActor:
    """Samples with pixels -> samples with features. Holds the tower."""

    def __init__(self, encoder: EncoderSettings) -> None:
        self.encoder = PatchEncoder(encoder.path, encoder.batch_size)
        self.dtype = encoder.dtype

    @carried
    def __call__(self, samples: pa.Table) -> pa.Table:
        """Replace the pixels of `samples`; what the tower cannot take gets a reason."""
        return with_features(samples, self.encoder, self.dtype)


@carried
def write_chunk(samples: pa.Table, work: Work) -> pa.Table:
    """The samples of one chunk -> its shard, written, and its receipt as JSON (column: receipt)."""
    samples = _with_shared_reasons(samples) if work.terms.share_images else samples
    bad = samples["reason"].is_valid()
    good = samples.filter(pc.invert(bad)) if pc.any(bad).as_py() else samples  # a filter copies every image
    good = good.select(SAMPLE_SCHEMA.names).cast(SAMPLE_SCHEMA)
    rejected = samples.filter(bad).select(QUARANTINE_SCHEMA.names)
    written, quarantined = good["key"].to_pylist(), rejected["key"].to_pylist()
    account(samples["key"].to_pylist(), written, quarantined)
    start = time.perf_counter()
    good = _images_apart(good, ImageStore(work.output)) if work.terms.share_images else good
    shard = write_shard(work.output, good) if good.num_rows else None
    receipt = Receipt(
        plan=work.plan_identity,
        chunk=samples["chunk"][0].as_py(),
        planned=samples.num_rows,
        keys=keys_digest(written + quarantined),
        shard=shard,
        quarantined=[QuarantinedRow(**row) for row in rejected.to_pylist()],
        facts=chunk_facts(samples, time.perf_counter() - start),
    )
    return pa.table({"receipt": [receipt.model_dump_json()]})


def _with_shared_reasons(samples: pa.Table) -> pa.Table:
    """A row whose image the tower refused when it stood in an earlier row of the chunk goes the same way as that."""
    columns = {name: samples[name].to_pylist() for name in ("image_key", "reason", "detail")}
    refused = {
        key: (reason, detail)
        for key, reason, detail in zip(*columns.values(), strict=True)
        if key and reason is not None
    }
    if not refused:
        return samples
    for row, key in enumerate(columns["image_key"]):
        if key in refused:
            columns["reason"][row], columns["detail"][row] = refused[key]
    for name in ("reason", "detail"):
        samples = samples.set_column(samples.schema.get_field_index(name), name, pa.array(columns[name], pa.string()))
    return samples


def _images_apart(samples: pa.Table, store: ImageStore) -> pa.Table:
    """`samples` (columns: SAMPLE_SCHEMA) with their images in `store`; the rows keep the keys alone."""
    mine = pc.and_(samples["image_key"].is_valid(), samples["image"].is_valid())
    store.put(samples.filter(mine).select(IMAGE_SCHEMA.names))
    for name in IMAGE_SCHEMA.names:
        if name != "image_key":
            field = samples.schema.field(name)
            empty = pa.nulls(samples.num_rows, field.type)
            samples = samples.set_column(samples.schema.get_field_index(name), field, empty)
    return samples


# A worker process runs many chunks: it unpacks the processor (a large tokenizer) once.
_MAKERS: dict[tuple[str, tuple[SourceFiles, ...], str], SampleMaker] = {}


def _maker(work: Work) -> SampleMaker:
    key = (work.plan_identity, work.files, work.output)  # the last, for the images that rows share
    if key not in _MAKERS:
        # A task has one CPU. Threads for the few short texts of a conversation cost more than the texts.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        _MAKERS.clear()
        store = ImageStore(work.output) if work.terms.share_images else None
        pins = ray.get(work.pins) if work.pins else None
        _MAKERS[key] = SampleMaker(work.terms, work.files, ray.get(work.processor), work.example_every, store, pins)
    return _MAKERS[key]


def _cpus(num_chunks: int) -> float:
    """CPUs of a task that makes and writes one of so many chunks.

    With two tasks to a CPU, one uses what the other leaves idle: it waits for the disk or the store when it writes, and
    the next one for Ray Data, which looks every tenth of a second whether a task has ended.
    """
    return 0.5 if num_chunks > _CHUNKS_TO_SHARE * ray.cluster_resources().get("CPU", 1) else 1


def _actors(encoder: EncoderSettings) -> dict[str, Any]:
    num_gpus = ray.cluster_resources().get("GPU", 0)
    return {
        "max_task_retries": CRASHES,
        "compute": ActorPoolStrategy(min_size=encoder.min_workers, max_size=encoder.most(num_gpus)),
        **_share(encoder),
    }


def _share(encoder: EncoderSettings) -> dict[str, float]:
    """What a process that holds the tower takes of the cluster."""
    return {"num_gpus": encoder.num_gpus} if ray.cluster_resources().get("GPU", 0) else {"num_cpus": 1}
