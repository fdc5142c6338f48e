"""Where the rows of corpora lie and how their images are, found by tasks: no file passes through the driver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray import ObjectRef

from pipelines.preparation.chunks import Chunk, check_rows, index_files, scans
from pipelines.preparation.image_pins import ImagePins
from pipelines.preparation.pinning import find_pins
from pipelines.preparation.row_images import SourceFiles
from pipelines.preparation.sources import SourceTerms
from pipelines.ray_tasks import carried, results


def plan_chunks(sources: Sequence[SourceTerms], files: Sequence[SourceFiles], chunk_rows: int) -> list[Chunk]:
    """The chunks of all `sources`, in order; a task for every file that can be indexed by itself.

    Raises:
        PlanError: a source holds no rows.
        FileFormatError: a file as a whole is not of its source's format.
        ClusterError: Ray itself failed.
    """
    index = ray.remote(carried(index_files))
    # Put once: of ten thousand files, each task would else carry all.
    held: ObjectRef[Sequence[SourceTerms]] = ray.put(list(sources))
    paths: ObjectRef[Sequence[str]] = ray.put([file.path for file in files])
    parts: list[list[Chunk]] = results([index.remote(lot, held, paths, chunk_rows) for lot in scans(sources)])
    chunks = [chunk for part in parts for chunk in part]
    check_rows(sources, chunks)
    return chunks


def pin_images(
    sources: Sequence[SourceTerms], files: Sequence[SourceFiles], chunks: Sequence[Chunk]
) -> ImagePins | None:
    """The state of every image that rows of `chunks` name, as `find_pins` has it."""
    return find_pins(sources, files, chunks, _in_tasks)


def _in_tasks(function: Callable[..., Any], shared: tuple[Any, ...], calls: list[tuple[Any, ...]]) -> list[Any]:
    task = ray.remote(carried(function))
    held = [ray.put(each) for each in shared]
    return results([task.remote(*held, *call) for call in calls])
