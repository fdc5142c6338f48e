"""The benchmark of preparation: what a rival writes is real, and what else the machine does is accounted for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from pipelines.benchmarks.data_tables import share_of_cores_left
from pipelines.benchmarks.loader_files import BATCHES_PER_FILE, write_batches
from pipelines.benchmarks.rounds import Rounds


def test_batches_are_written_whole_and_hashed(tmp_path: Path) -> None:
    draw = torch.Generator().manual_seed(0)
    batches = [
        {
            "input_ids": torch.randint(0, 1000, (rows, width), generator=draw),
            "pixel_values": torch.randint(0, 256, (rows, 1, 3, 4, 4), generator=draw, dtype=torch.uint8),
        }
        for rows, width in [(3, 5)] * BATCHES_PER_FILE + [(2, 7)]
    ]
    hashes = write_batches(iter(batches), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "index.json").read_text()) == hashes
    rows = []
    for name, digest in hashes.items():
        data = (tmp_path / "out" / name).read_bytes()
        assert hashlib.sha256(data).hexdigest() == digest
        rows += pa.ipc.open_file(data).read_all().to_pylist()
    expected = [
        (ids, pixels)
        for batch in batches
        for ids, pixels in zip(batch["input_ids"].tolist(), batch["pixel_values"].numpy(), strict=True)
    ]
    assert len(hashes) == 2 and len(rows) == len(expected)
    for row, (ids, pixels) in zip(rows, expected, strict=True):
        assert row["input_ids"] == ids
        np.testing.assert_array_equal(np.frombuffer(row["pixel_values"], np.uint8).reshape(pixels.shape), pixels)


def test_a_store_on_the_machine_is_not_held_against_a_preparation() -> None:
    """It took half of a core for ten seconds: three quarters of what one and a half cores would do."""
    bare = {"rows_per_s": 100.0, "seconds": 10.0, "cpu_s": 10.0, "machine_cpu_s": 10.0}
    ours = {"rows_per_s": 112.5, "seconds": 10.0, "cpu_s": 14.0, "machine_cpu_s": 19.0}
    rounds = Rounds([{"bare": bare, "ours": ours}], [0.0])
    assert share_of_cores_left(rounds, "ours", "bare", cores=2).median == 0.75
    assert share_of_cores_left(rounds, "bare", "bare", cores=2).median == 0.5
