"""Ray as the jobs use it: chunks are tasks, or blocks of Ray Data all the way, and errors come to the driver as raised.

Ray Data wraps what a task raises, logs it three times and asks for a bug report; a person needs the one line.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from itertools import islice
from typing import Any, ParamSpec, TypeVar

import ray
from ray.data import DataContext, Dataset
from ray.exceptions import ObjectStoreFullError, OutOfDiskError, RayError, RayTaskError

from pipelines.encode import DeviceError

WHOLE_BLOCK: dict[str, Any] = {"batch_size": None, "batch_format": "pyarrow"}
"""Arguments of `map_batches` that hand in a block as it is."""
_DEVICE_TRIES = 3
_CRASHES = 10  # of workers and nodes under one call, before it counts as the call's own fault
_LOOK_S = 5.0  # seconds between looks at the size of the cluster, which may grow
_LOUD_LOGGERS = ("exceptions", "_internal.execution.streaming_executor_state", "_internal.progress")

Step = ParamSpec("Step")
Done = TypeVar("Done")


class ClusterError(ValueError):
    """Ray could not carry out the chunks; the message says what it lacks."""


class _Carrier(Exception):
    """Brings what a task raised to the driver as it is: Ray Data writes advice for its users into the first text."""


def carried(step: Callable[Step, Done]) -> Callable[Step, Done]:
    """`step` of a chain or a task, whose exceptions `column` and `as_done` can unwrap."""

    @wraps(step)
    def run(*args: Step.args, **kwargs: Step.kwargs) -> Done:
        try:
            return step(*args, **kwargs)
        except Exception as error:
            raise _Carrier(error) from error

    return run


def as_done(
    step: Callable[..., Done], calls: Iterable[tuple[Any, ...]], shared: tuple[Any, ...], num_cpus: float
) -> Iterator[Done]:
    """What `step` returns for each of `calls`, as it is done, in any order; a task each, of `num_cpus` CPUs.

    More calls are handed in than can run, so that no CPU waits for the driver and a cluster that can grow sees that it
    should. A call whose worker or node dies is made again.

    Args:
        step: called with the arguments of a call, followed by `shared`.
        calls: taken as there is room for them.
        shared: what all calls have in common, handed to each machine once.
        num_cpus: of a call.

    Raises:
        what a call raised, where `step` is `carried`; the others are not waited for.
        ClusterError: Ray itself failed: its object store is full, its nodes are gone, ...
    """
    task = ray.remote(step).options(num_cpus=num_cpus, max_retries=_CRASHES)
    held = [ray.put(each) for each in shared]
    left = iter(calls)
    waiting: list[ray.ObjectRef] = []
    room, looked = 0, float("-inf")
    try:
        while True:
            if time.monotonic() - looked > _LOOK_S:
                room, looked = 2 * int(ray.cluster_resources().get("CPU", 1) / num_cpus) + 2, time.monotonic()
            waiting += [task.remote(*call, *held) for call in islice(left, max(0, room - len(waiting)))]
            if not waiting:
                return
            [done], waiting = ray.wait(waiting)
            yield ray.get(done)
    except RayError as error:
        raise _original(error) from error
    finally:
        for each in waiting:
            ray.cancel(each)


def column(chain: Dataset, name: str) -> Iterator[Any]:
    """The values of a column as the blocks of `chain` are done, in any order.

    Raises:
        what a task raised, without Ray's wrapping, where its step is `carried`.
        ClusterError: Ray itself failed: its object store is full, its nodes are gone, ...
    """
    try:
        # To prefetch would be to hold a finished chunk back until another one is: a kill would then cost it as well.
        for batch in chain.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
            yield from batch[name].to_pylist()
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
    return ClusterError(f"Ray: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}")
