"""Ray's object store is full, and the disk that it spills to as well."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import SiglipVisionConfig, SiglipVisionModel

from pipelines.settings import dump_settings
from pipelines.shards import ShardedDataset
from tests.corpus import row, write_corpus
from tests.fixtures.tiny import build_processor
from tests.preparation import prepare_here, prepare_settings

REPOSITORY = Path(__file__).parents[2]
NUM_ROWS, WIDTH = 200, 640
FULL = {"RAY_DEFAULT_OBJECT_STORE_MAX_MEMORY_BYTES": str(80 * 2**20), "RAY_local_fs_capacity_threshold": "0.0001"}


@pytest.mark.ray
def test_full_object_store_is_named_and_resumed(tmp_path: Path) -> None:
    """One chunk of features is 104 MB: 5 tiles of 81 patches."""
    config = SiglipVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=126,
        patch_size=14,
    )
    SiglipVisionModel(config).save_pretrained(tmp_path / "tower")
    build_processor("hd").save_pretrained(tmp_path / "processor")
    write_corpus(tmp_path, [row(4 * number, image="images/0.jpg") for number in range(NUM_ROWS)])
    settings = prepare_settings(
        tmp_path, payload="features", encoder={"path": str(tmp_path / "tower")}, chunk_rows=NUM_ROWS
    )
    (tmp_path / "recipe.yaml").write_text(dump_settings(settings))
    command = [sys.executable, "jobs/prepare.py", "--config", str(tmp_path / "recipe.yaml")]
    env = {**os.environ, **FULL}
    done = subprocess.run(command, cwd=REPOSITORY, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done
    assert "error: Ray's object store is full, and so is the disk that it spills to" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert prepare_here(settings).written == NUM_ROWS
    dataset = ShardedDataset(settings.output)
    assert [dataset.read(index)["key"] for index in range(NUM_ROWS)] == [f"corpus:{n}" for n in range(NUM_ROWS)]
