"""Samples with pixels -> samples with what the frozen tower makes of them. Plain Python: nothing here knows of Ray."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.encode import NotEncoded, PatchEncoder
from pipelines.shards.quantization import quantize

_CHANGED = ("image", "image_shape", "image_dtype", "image_scales", "reason", "detail", "encode_seconds")


def with_features(samples: pa.Table, encoder: PatchEncoder, dtype: str) -> pa.Table:
    """`samples` (columns: WORK_SCHEMA) with features in the place of pixels, stored as `dtype`: float16 or int8.

    A row whose image the tower cannot take gets a reason. The rows without an image stay as they are.

    Raises:
        EncoderError: the accelerator failed.
    """
    rows = [row for row, has in enumerate(samples["image"].is_valid().to_pylist()) if has]
    if not rows:
        return samples
    columns = {name: samples[name].to_pylist() for name in _CHANGED}
    start = time.perf_counter()
    pixels = [np.frombuffer(columns["image"][row], np.uint8).reshape(columns["image_shape"][row]) for row in rows]
    encoded = encoder(np.stack(pixels))
    fields = [_fields(features, dtype) for features in encoded]
    seconds = (time.perf_counter() - start) / len(rows)
    for row, values in zip(rows, fields, strict=True):
        for name, value in {**values, "encode_seconds": seconds}.items():
            columns[name][row] = value
    for name, values in columns.items():
        field = samples.schema.field(name)
        samples = samples.set_column(samples.schema.get_field_index(name), field, pa.array(values, field.type))
    return samples


def _fields(features: np.ndarray | NotEncoded, dtype: str) -> dict[str, Any]:
    if isinstance(features, NotEncoded):
        return {"image": None, "reason": features.reason, "detail": features.detail}
    if dtype == "float16":
        return {"image": features.tobytes(), "image_shape": list(features.shape), "image_dtype": dtype}
    numbers, scales = quantize(features)
    return {
        "image": numbers.tobytes(),
        "image_shape": list(numbers.shape),
        "image_dtype": dtype,
        "image_scales": scales.tobytes(),
    }
