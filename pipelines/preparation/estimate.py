"""How large a dataset will be, from a look at a few of its rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from itertools import islice

import numpy as np

from pipelines.preparation.chunks import Chunk, read_chunk
from pipelines.preparation.plan import Plan
from pipelines.preparation.row_images import SourceFiles, fetch_image, row_image
from pipelines.records import Record, RowError

_CHUNKS = 20
_IMAGES_PER_CHUNK = 5  # fetched, where the images' own bytes are stored
_ROW_BYTES = 1800  # of a record batch of one row, beside its text, tokens and image
_BYTES_PER_TOKEN = 12  # three numbers of four bytes
_LAYOUT_TOKENS = 60  # the system text, the names of the roles, the query tokens
_CHARACTERS_PER_TOKEN = 4


def image_bytes(shape: list[int] | None, dtype: str | None) -> int | None:
    """Bytes of a stored array, scales included; None where images are stored as received."""
    if not shape:
        return None
    scales = 2 * math.prod(shape[:-1]) if dtype == "int8" else 0
    return math.prod(shape) * np.dtype(dtype).itemsize + scales


def estimate_bytes(plan: Plan, files: Sequence[SourceFiles]) -> int:
    """About how many bytes the shards of `plan` will have, by the rows of up to twenty of its chunks.

    What rows share is counted for each of them. `files` says where each source lies.

    Raises:
        PlanError: a row names its image, as all rows of its format do, and its source has no image_root.
    """
    step = math.ceil(len(plan.chunks) / _CHUNKS)
    looked_at = plan.chunks[::step]
    total = sum(_chunk_bytes(plan, chunk, files[chunk.source]) for chunk in looked_at)
    return round(total * plan.num_rows / sum(chunk.rows for chunk in looked_at))


def _chunk_bytes(plan: Plan, chunk: Chunk, files: SourceFiles) -> float:
    source = plan.terms.sources[chunk.source]
    rows = read_chunk(source, files.path, chunk)
    if files.image_root is None:
        for row in rows:
            with suppress(RowError):  # it will go to the quarantine
                row_image(row, None, source)
    records = [row.content for row in rows if isinstance(row.content, Record)]
    text = sum(len(message["content"]) for record in records for message in record.messages)
    images = [record.image for record in records if record.image is not None]
    each = image_bytes(plan.terms.image_shape, plan.terms.image_dtype)
    if each is None and images:
        sizes = [_size(files, image) for image in islice(images, _IMAGES_PER_CHUNK)]
        each = round(sum(sizes) / len(sizes))
    tokens = text / _CHARACTERS_PER_TOKEN + len(records) * _LAYOUT_TOKENS + len(images) * plan.terms.num_image_tokens
    return len(records) * _ROW_BYTES + text + tokens * _BYTES_PER_TOKEN + len(images) * (each or 0)


def _size(files: SourceFiles, image: str | bytes) -> int:
    if isinstance(image, bytes):
        return len(image)
    try:
        return len(fetch_image(files.image_root, image)) if files.image_root else 0
    except RowError:
        return 0  # its row will go to the quarantine
