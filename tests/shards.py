"""Small datasets in shards, and ways to damage one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import storage
from pipelines.shards import Manifest
from pipelines.shards.manifest import MANIFEST_NAME, QuarantineEntry, ShardEntry
from pipelines.shards.schema import SAMPLE_SCHEMA, describe
from pipelines.shards.writer import write_shard

SHAPES = {"pixels": [1, 3, 4, 4], "features": [1, 9, 8], "original": []}
DTYPES = {"pixels": "uint8", "features": "float16", "original": ""}
FIELDS = {"pixels": "pixel_values", "features": "patch_features", "original": "image_bytes"}


def sample(number: int, payload: str) -> dict[str, Any]:
    """Every third row is text only."""
    rng = np.random.default_rng(number)
    ids = rng.integers(0, 100, 5 + number).tolist()
    image = rng.integers(0, 50, SHAPES[payload] or [7]).astype(DTYPES[payload] or "uint8")
    picture = {"image": image.tobytes(), "image_shape": SHAPES[payload], "image_dtype": DTYPES[payload]}
    return {
        "key": f"corpus:{number}",
        "id": "repeated",
        "source": "corpus",
        "messages": [{"role": "user", "content": f"question {number} é"}, {"role": "assistant", "content": "answer"}],
        "question_types": ["colour"],
        "input_ids": ids,
        "labels": [-100] * 3 + ids[3:],
        "question_ids": [0, 1, 2, *[0] * (len(ids) - 3)],
    } | (picture if number % 3 else {})


def write_dataset(folder: str, payload: str = "pixels", rows: int = 10, per_shard: int = 4) -> list[dict[str, Any]]:
    samples = [sample(number, payload) for number in range(rows)]
    parts = [samples[start : start + per_shard] for start in range(0, rows, per_shard)]
    shards = [write_shard(folder, pa.Table.from_pylist(part, schema=SAMPLE_SCHEMA)) for part in parts]
    write_manifest(folder, payload, shards)
    return samples


def write_manifest(folder: str, payload: str, shards: list[ShardEntry]) -> None:
    rows = sum(shard.rows for shard in shards)
    manifest = Manifest(
        plan="0" * 64,
        payload=payload,
        layout="chat",
        max_length=3072,
        tiling="base",
        num_image_tokens=9,
        image_shape=SHAPES[payload] or None,
        processor_identity="1" * 64,
        encoder_identity=None,
        schema=describe(SAMPLE_SCHEMA),
        planned=rows,
        written=rows,
        quarantined=0,
        quarantine_reasons={},
        quarantine=QuarantineEntry(name="quarantine.parquet", rows=0, bytes=0, sha256=""),
        shards=shards,
    )
    storage.write_bytes(storage.join(folder, MANIFEST_NAME), manifest.to_json())


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
