"""The same rows in every format become the same samples, alone and together, on a disk and on S3."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from jobs.prepare import main
from pipelines import storage
from pipelines.corpora import FORMATS
from pipelines.preparation.data_receipt import DataReceipt
from pipelines.shards import Manifest, ShardedDataset
from tests.corpus import row, write_corpus, write_processor
from tests.formats import write_as
from tests.preparation import prepare_here, prepare_settings

NAMES = ["llava", "llava-array", "sharegpt", "messages", "parquet", "webdataset"]
NUM_ROWS = 9
COLUMNS = ("id", "messages", "input_ids", "labels", "question_ids", "pixel_values")


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Nine good rows as LLaVA lines, with images and a processor."""
    write_corpus(tmp_path, NUM_ROWS)
    write_processor(tmp_path)
    return tmp_path


def rows_of(output: str) -> list[dict[str, Any]]:
    dataset = ShardedDataset(output)
    return [dataset.read(index) for index in range(len(dataset))]


def check_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        for column in COLUMNS:
            assert (column in mine) == (column in theirs)
            np.testing.assert_equal(mine.get(column), theirs.get(column))


def test_every_format_is_tried_here() -> None:
    others = {"images", "questions"}  # without an answer, and with only one
    assert {name.partition("-")[0] for name in NAMES} == set(FORMATS) - others


@pytest.mark.parametrize("name", NAMES)
def test_the_same_rows_become_the_same_samples(
    corpus: Path, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(number) for number in range(NUM_ROWS)]
    prepare_here(prepare_settings(corpus))
    source = write_as(name, corpus, rows)
    output = str(tmp_path / "other")
    manifest = prepare_here(prepare_settings(corpus, sources=[source], output=output))
    assert (manifest.planned, manifest.written) == (NUM_ROWS, NUM_ROWS)
    check_same(rows_of(output), rows_of(str(corpus / "out")))
    assert main(["inspect", output, "--key", f"{name}:8"]) == 0
    assert f"{name}:8  (id own-2, source {name})" in capsys.readouterr().out
    assert main(["verify", output]) == 0


@pytest.mark.s3
@pytest.mark.parametrize("name", NAMES)
def test_on_s3_as_on_a_disk(corpus: Path, name: str, s3_uri: str) -> None:
    source = write_as(name, corpus, [row(number) for number in range(NUM_ROWS)])
    for file in (Path(source["path"]), *(corpus / "images").iterdir()):
        storage.write_bytes(storage.join(s3_uri, str(file.relative_to(corpus))), file.read_bytes())
    there = source | {"path": storage.join(s3_uri, name, Path(source["path"]).name), "image_root": s3_uri}
    output = storage.join(s3_uri, "out")
    prepare_here(prepare_settings(corpus, sources=[there], output=output))
    prepare_here(prepare_settings(corpus, sources=[source]))
    check_same(rows_of(output), rows_of(str(corpus / "out")))


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_a_recipe_of_all_formats_with_weights_and_limits(
    corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(number) for number in range(NUM_ROWS)]
    sources: list[dict[str, Any]] = [dict(write_as(name, corpus, rows)) for name in NAMES]
    sources[0] |= {"limit": 5}
    sources[2] |= {"weight": 2}
    sources[4] |= {"path": f"{corpus}/parquet/*.parquet", "name": "hub"}
    recipe = tmp_path / "recipe.yaml"
    settings = {
        "sources": sources,
        "output": str(tmp_path / "mix"),
        "processor": str(corpus / "processor"),
        "chunk_rows": 8,  # of many small chunks, two would share a CPU: eight workers, each seconds to start
    }
    recipe.write_text(yaml.safe_dump(settings))
    planned = {"llava": 5, "llava-array": 9, "sharegpt": 18, "messages": 9, "hub": 9, "webdataset": 9}

    assert main(["--config", str(recipe), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"{sum(planned.values())} rows in " in out and "GB of shards" in out
    for source, (name, count) in zip(sources, planned.items(), strict=True):
        assert f"  {name}: {count} rows of {source['path'].replace('*', 'parquet')}" in out
    assert not (tmp_path / "mix").exists()

    assert main(["--config", str(recipe)]) == 0
    manifest = Manifest.load(settings["output"])
    assert (manifest.written, manifest.quarantined) == (sum(planned.values()), 0)
    receipt = DataReceipt.model_validate_json((tmp_path / "mix" / "receipt.json").read_bytes())
    assert {source.name: source.written for source in receipt.sources} == planned
    assert [source.format for source in receipt.sources] == [source["format"] for source in sources]
    found = rows_of(settings["output"])
    keys = [each["key"] for each in found]
    assert len(set(keys)) == len(keys)
    assert keys[14:32] == [f"sharegpt:{n}" for n in range(9)] + [f"sharegpt:{n}+1" for n in range(9)]
    assert keys[41:50] == [f"hub/parquet.parquet:{n}" for n in range(9)]
    capsys.readouterr()
    for key in ("sharegpt:8+1", "hub/parquet.parquet:8"):
        assert main(["inspect", settings["output"], "--key", key]) == 0
        assert f"{key}  (id own-2, source {key.partition(':')[0].partition('/')[0]})" in capsys.readouterr().out
    for key in ("sharegpt:8+2", "hub:8", "llava:5", "llava:x"):
        assert main(["inspect", settings["output"], "--key", key]) == 1
        assert f"no row has the key {key!r}" in capsys.readouterr().err
    assert json.loads((tmp_path / "mix" / "plan.json").read_bytes())["terms"]["sources"][2]["weight"] == 2
