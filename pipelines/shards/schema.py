"""What a row of a shard holds. Explicit types only: an inferred schema would let pickled objects in."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])

SAMPLE_SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # source and position, unique in a preparation
        ("id", pa.string()),  # the corpus's own id, may repeat
        ("source", pa.string()),
        ("messages", pa.list_(MESSAGE)),
        ("question_types", pa.list_(pa.string())),  # one per user turn, or empty
        ("input_ids", pa.list_(pa.int32())),
        ("labels", pa.list_(pa.int32())),
        ("question_ids", pa.list_(pa.int32())),
        ("image_key", pa.string()),  # of an image that rows share and that is stored apart, in `images/`; else null
        ("image", pa.large_binary()),  # null for text only, and where stored apart; large: a block may pass 2 GiB
        ("image_shape", pa.list_(pa.int32())),  # of the array in `image`; empty for encoded bytes
        ("image_dtype", pa.string()),  # "uint8", "float16", "int8"; empty for encoded bytes
        ("image_scales", pa.large_binary()),  # float16[T, P] beside int8[T, P, D], else null
    ]
)
"""The columns of a sample. `image` is the payload: encoded bytes, or the raw bytes of a C-ordered array."""

IMAGE_SCHEMA = pa.schema([SAMPLE_SCHEMA.field(name) for name in SAMPLE_SCHEMA.names if name.startswith("image")])
"""The columns of a shared image."""

QUARANTINE_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("key", "id", "source", "location", "reason", "detail")],
)
"""The columns of the table of rows that could not become samples."""

IGNORED_LABEL = -100


def image_column(images: Sequence[bytes | np.ndarray | None]) -> pa.ChunkedArray:
    """The column `image` with these values. Each row is a view of the bytes or of the C-ordered array that is given."""
    return pa.chunked_array([_view(image) for image in images], pa.large_binary())


def _view(image: bytes | np.ndarray | None) -> pa.Array:
    if image is None:
        return pa.nulls(1, pa.large_binary())
    data = pa.py_buffer(image)
    return pa.Array.from_buffers(pa.large_binary(), 1, [None, pa.py_buffer(np.array([0, data.size], np.int64)), data])


def describe(schema: pa.Schema) -> dict[str, str]:
    """Column name to Arrow type, as the manifest stores it."""
    return {field.name: str(field.type) for field in schema}
