"""Ray as the jobs use it: a block is a chunk all the way, and what goes wrong reaches the driver as it was raised.

Ray wraps what a task raises, and Ray Data logs it three times and asks for a bug report; a person needs the one line.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any, ParamSpec, Protocol, TypeVar

import ray
from ray import ObjectRef
from ray.data import DataContext, Dataset
from ray.data._internal.execution.resource_manager import ResourceManager
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayError,
    RayTaskError,
    WorkerCrashedError,
)

from pipelines.device_errors import DeviceError

WHOLE_BLOCK: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
"""Arguments of `map_batches` that hand in a block as it is."""
CRASHES = 3
"""Workers that a chunk may cost by a fault of a machine; one more is its own fault. Ray Data would go on for ever."""
CRASHED = (WorkerCrashedError, OutOfMemoryError, ActorDiedError, ActorUnavailableError, NodeDiedError)
"""What Ray says of a task whose process was lost."""
_DEVICE_TRIES = 3
_LOUD_LOGGERS = ("exceptions", "_internal.execution.streaming_executor_state", "_internal.progress")

Step = ParamSpec("Step")
Done = TypeVar("Done")


class _OfChunk(Protocol):
    chunk: int


Receipted = TypeVar("Receipted", bound=_OfChunk)


class ClusterError(ValueError):
    """Ray could not carry out the chunks; the message says what it lacks."""


class CrashError(ClusterError):
    """A worker died under the same chunk, again and again: its process, or the node that it ran on."""


class _Carrier(Exception):
    """Brings what a task raised to the driver as it is: Ray Data writes advice for its users into the first text."""


def carried(step: Callable[Step, Done]) -> Callable[Step, Done]:
    """`step` of a chain, or a task, whose exceptions `column` and `results` can unwrap."""

    @wraps(step)
    def run(*args: Step.args, **kwargs: Step.kwargs) -> Done:
        try:
            return step(*args, **kwargs)
        except Exception as error:
            raise _Carrier(error) from error

    return run


def column(chain: Dataset, name: str) -> Iterator[Any]:
    """The values of a column as the blocks of `chain` are done, in any order.

    Raises:
        what a task raised, without Ray's wrapping, where its step is `carried`.
        ClusterError: Ray itself failed: its object store is full, its nodes are gone, ...
        CrashError: a chunk cost CRASHES workers and one more.
    """
    try:
        # To prefetch would be to hold a finished chunk back until another one is: a kill would then cost it as well.
        for batch in chain.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from batch[name].to_pylist()
    except RayError as error:
        raise _original(error) from error


def named(
    receipts: Iterator[Receipted], pending: Sequence[int], name: Callable[[list[int]], str | None]
) -> Iterator[Receipted]:
    """`receipts` of the chunks `pending`, as they come. Where workers died of a chunk, Ray does not say of which.

    Args:
        receipts: in any order.
        pending: numbers of chunks, in the order in which they begin: it is one of the first of those that are left.
        name: given those that are left, says which it is, in the words of an error; None where it finds none.

    Raises:
        CrashError: workers died of a chunk; with what `name` says.
    """
    left = dict.fromkeys(pending)
    try:
        for receipt in receipts:
            left.pop(receipt.chunk)
            yield receipt
    except CrashError as error:
        if found := name(list(left)):
            raise CrashError(found) from error
        raise


def results(tasks: Sequence[ObjectRef[Done]]) -> list[Done]:
    """What `tasks` return, in their order.

    Raises: as `column`.
    """
    try:
        return ray.get(list(tasks))
    except RayError as error:
        raise _original(error) from error


def quiet_context() -> DataContext:
    """Settings under which a chain keeps its blocks and leaves it to us to speak."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Ray's own old settings, which a copy touches
        context = DataContext.get_current().copy()
    context.target_max_block_size = None  # a chunk must come out as one block, whatever its images weigh
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True
    context.memory_usage_poll_interval_s = None  # a thread of each task would count its pages, every second
    # The first answer is that there are no CPUs, since it has not heard of any yet; with Ray Data's one second until it
    # asks again, a single task would run that long.
    ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S = 0.1  # type: ignore[assignment]  # whole seconds by its default
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    for name in _LOUD_LOGGERS:
        logging.getLogger(f"ray.data.{name}").setLevel(logging.CRITICAL)
    return context


def retried(pending: Callable[[], Iterator[Done]]) -> Iterator[Done]:
    """What all pending chunks give; begins anew, with new workers, where an accelerator fails.

    A CUDA error leaves its process unable to use the GPU, so only another process can show whether it was a passing
    one.

    Raises:
        DeviceError: it failed three times without a chunk done in between.
    """
    failures = 0
    while True:
        try:
            for done in pending():
                failures = 0
                yield done
            return
        except DeviceError as error:
            failures += 1
            if failures == _DEVICE_TRIES:
                raise
            print(f"{error}; trying again with new workers ({failures} of {_DEVICE_TRIES - 1})", flush=True)


def _original(error: RayError) -> BaseException:
    cause = error.cause if isinstance(error, RayTaskError) else error
    if isinstance(cause, _Carrier):
        return cause.args[0]
    if isinstance(cause, ObjectStoreFullError | OutOfDiskError):
        return ClusterError(
            "Ray's object store is full, and so is the disk that it spills to: give the nodes more object store memory "
            "or disk, or make chunks smaller (chunk_rows, in another output). What is done is kept: run again to go "
            "on from here"
        )
    if isinstance(error, RayTaskError):
        return error
    if isinstance(error, CRASHED):
        return CrashError(
            f"a chunk cost {CRASHES + 1} workers (Ray: {type(error).__name__}): a row of it may take more memory than "
            "a worker has. What is done is kept: run again to go on from here"
        )
    return ClusterError(f"Ray: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
