"""What a row of a shard holds. Explicit types only: an inferred schema would let pickled objects in."""

from __future__ import annotations

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
        ("image", pa.large_binary()),  # null for a text-only row; large: a block may pass 2 GiB
        ("image_shape", pa.list_(pa.int32())),  # of the array in `image`; empty for encoded bytes
        ("image_dtype", pa.string()),  # "uint8", "float16"; empty for encoded bytes
    ]
)
"""The columns of a sample. `image` is the payload: encoded bytes, or the raw bytes of a C-ordered array."""

QUARANTINE_SCHEMA = pa.schema(
    [(name, pa.string()) for name in ("key", "id", "source", "location", "reason", "detail")],
)
"""The columns of the table of rows that could not become samples."""

IGNORED_LABEL = -100


def describe(schema: pa.Schema) -> dict[str, str]:
    """Column name to Arrow type, as the manifest stores it."""
    return {field.name: str(field.type) for field in schema}
