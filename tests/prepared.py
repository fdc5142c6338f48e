"""Prepared folders written straight from conversations, for tests that begin where preparation ends."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from PIL import Image

from flashsloth import FlashSlothProcessor
from flashsloth.collation import collate
from flashsloth.image_processing_flashsloth import normalize_pixels
from pipelines import storage
from pipelines.shards.manifest import MANIFEST_NAME, Layout, Manifest, Payload, QuarantineEntry
from pipelines.shards.schema import SAMPLE_SCHEMA, describe
from pipelines.shards.writer import write_shard

COLOURS = {"red": (220, 40, 40), "green": (40, 180, 60), "blue": (50, 60, 220), "yellow": (230, 210, 40)}


def coloured_rows(count: int, text_only_every: int = 0, turns: int = 1) -> list[dict[str, Any]]:
    """Rows about one-coloured pictures; every `text_only_every`-th is without a picture."""
    rows = []
    for index in range(count):
        colour = list(COLOURS)[index % len(COLOURS)]
        with_image = not text_only_every or index % text_only_every != text_only_every - 1
        question = "What color is the square?" if with_image else f"Name {colour} again please ."
        messages = []
        for turn in range(turns):
            messages += [
                {"role": "user", "content": question + " please" * (index % 3) + " now" * turn},
                {"role": "assistant", "content": colour},
            ]
        picture = Image.new("RGB", (140, 126), COLOURS[colour]) if with_image else None
        rows.append({"messages": messages, "question_types": ["colour"] * turns, "picture": picture})
    return rows


def model_batch(processor: FlashSlothProcessor, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """What the model takes of `rows`, labels included; of one row, so without padding."""
    samples = []
    for row in rows:
        sample = dict(processor.encode(row["messages"], row["picture"] is not None, layout="chat"))
        if row["picture"] is not None:
            sample["pixel_values"] = processor.image_processor.to_uint8(row["picture"])
        samples.append(sample)
    inputs = collate(samples, processor.pad_token_id)
    if "pixel_values" in inputs:
        inputs["pixel_values"] = normalize_pixels(inputs["pixel_values"])
    return inputs


def write_prepared(
    folder: Path | str,
    rows: Sequence[dict[str, Any]],
    processor: FlashSlothProcessor,
    payload: Payload = "pixels",
    layout: Layout = "chat",
    rows_per_shard: int = 8,
    features: tuple[int, ...] = (1, 81, 128),  # tiles, patches and width of the tiny preset
) -> str:
    """Write `rows` as `jobs/prepare.py` would, to a folder or a URI; returns it."""
    table = [_row(index, row, processor, payload, layout, features) for index, row in enumerate(rows)]
    shards = [
        write_shard(str(folder), pa.Table.from_pylist(table[i : i + rows_per_shard], schema=SAMPLE_SCHEMA))
        for i in range(0, len(table), rows_per_shard)
    ]
    shapes = [row["image_shape"] for row in table if row["image_shape"]]
    manifest = Manifest(
        plan="test",
        payload=payload,
        layout=layout,
        max_length=processor.max_length,
        tiling=processor.image_processor.tiling,
        num_image_tokens=processor.num_image_tokens,
        image_shape=shapes[0] if shapes else None,
        processor_identity=processor.identity(),
        encoder_identity="test" if payload == "features" else None,
        schema=describe(SAMPLE_SCHEMA),
        planned=len(table),
        written=len(table),
        quarantined=0,
        quarantine_reasons={},
        quarantine=QuarantineEntry(name="quarantine/none.parquet", rows=0, bytes=0, sha256="0" * 64),
        shards=shards,
    )
    storage.write_bytes(storage.join(str(folder), MANIFEST_NAME), manifest.to_json())
    return str(folder)


def _row(
    index: int,
    row: dict[str, Any],
    processor: FlashSlothProcessor,
    payload: str,
    layout: str,
    features: tuple[int, ...],
) -> dict[str, Any]:
    image, shape, dtype = _payload(row["picture"], processor, payload, features)
    return {
        "key": f"test:{index}",
        "id": str(index),
        "source": "test",
        "messages": row["messages"],
        "question_types": row["question_types"],
        **processor.encode(row["messages"], row["picture"] is not None, layout=layout),
        "image": image,
        "image_shape": shape,
        "image_dtype": dtype,
    }


def _payload(
    picture: Image.Image | None, processor: FlashSlothProcessor, payload: str, features: tuple[int, ...]
) -> tuple[bytes | None, list[int], str]:
    if picture is None:
        return None, [], ""
    if payload == "original":
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        return buffer.getvalue(), [], ""
    if payload == "pixels":
        array: np.ndarray = processor.image_processor.to_uint8(picture)
    else:
        seed = int(np.asarray(picture)[0, 0].sum())
        array = np.random.default_rng(seed).standard_normal(features).astype(np.float16)
    return array.tobytes(), list(array.shape), str(array.dtype)
