"""The whole preparation on Ray: from a corpus to a dataset that reads back as what its rows are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.image_processing_flashsloth import decode_image
from pipelines.preparation.receipt_book import PublishError
from pipelines.preparation.settings import PrepareSettings
from pipelines.preparation.sources import PlanError
from pipelines.prepare import prepare
from pipelines.shards import Manifest, ShardedDataset
from tests.corpus import bad_rows, encoded, row, write_corpus, write_processor

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


def recipe(folder: Path, path: Path | None = None, **change: Any) -> PrepareSettings:
    """Settings for the corpus in `folder`, five rows to a chunk."""
    path = path or folder / "corpus.jsonl"
    base = {
        "sources": [{"path": str(path), "image_root": str(path.parent)}],
        "output": str(folder / "out"),
        "processor": str(folder / "processor"),
        "chunk_rows": 5,
    }
    return PrepareSettings(**base | change)


@pytest.mark.parametrize(
    ("payload", "dtype", "max_workers"),
    [("original", None, 1), ("pixels", "uint8", 1), ("features", "float16", 2), ("features", "int8", 1)],
)
def test_each_payload_reads_back_as_computed_directly(
    tmp_path: Path, tiny_checkpoint: Path, payload: str, dtype: str | None, max_workers: int
) -> None:
    write_corpus(tmp_path, 12, "corpus.json")
    tower = {"path": str(tiny_checkpoint), "dtype": dtype, "min_workers": 1, "max_workers": max_workers}
    encoder = {"encoder": tower} if payload == "features" else {}
    settings = recipe(tmp_path, tmp_path / "corpus.json", processor=str(tiny_checkpoint), payload=payload, **encoder)
    manifest = prepare(settings)
    assert manifest is not None
    assert (manifest.planned, manifest.written, manifest.quarantined) == (12, 12, 0)
    assert [shard.rows for shard in manifest.shards] == [5, 5, 2]
    assert manifest.image_dtype == dtype
    model = FlashSlothForConditionalGeneration.from_pretrained(tiny_checkpoint)
    processor = FlashSlothProcessor.from_pretrained(tiny_checkpoint)
    dataset = ShardedDataset(settings.output)
    for number in range(12):
        read = dataset.read(number)
        assert read["key"] == f"corpus:{number}"
        tokens = processor.encode(read["messages"], has_image=number % 4 != 3)
        assert read["input_ids"].tolist() == tokens["input_ids"]
        if number % 4 == 3:
            assert not {"image_bytes", "pixel_values", "patch_features"} & set(read)
            continue
        image = decode_image(encoded(number))
        pixels = processor.image_processor.to_uint8(image)
        if payload == "original":
            assert read["image_bytes"] == encoded(number)
        elif payload == "pixels":
            assert list(read["pixel_values"].shape) == manifest.image_shape
            np.testing.assert_array_equal(read["pixel_values"], pixels)
        else:
            features = model.get_patch_features(processor.image_processor([image])["pixel_values"])[0]
            assert list(read["patch_features"].shape) == manifest.image_shape
            tolerance = 2e-3 if dtype == "float16" else float(features.detach().abs().max()) / 127
            np.testing.assert_allclose(read["patch_features"], features.detach().numpy(), atol=tolerance)


def test_bad_rows_are_quarantined_and_all_others_written(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    bad = bad_rows(tmp_path)
    path = write_corpus(tmp_path, [*(row(number) for number in range(8)), *bad.values()])
    write_processor(tmp_path)
    manifest = prepare(recipe(tmp_path, path, max_quarantined_share=0.9, max_length=500))
    assert manifest is not None
    assert manifest.quarantine_reasons == dict.fromkeys(sorted(bad), 1)
    assert (manifest.planned, manifest.written, manifest.quarantined) == (8 + len(bad), 8, len(bad))
    dataset = ShardedDataset(str(tmp_path / "out"))
    assert [dataset.read(number)["key"] for number in range(8)] == [f"corpus:{number}" for number in range(8)]


def test_too_many_bad_rows_publish_nothing(tmp_path: Path) -> None:
    write_corpus(tmp_path, 10)
    write_processor(tmp_path)
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(PublishError, match=r"rows are quarantined \(image_missing"):
        prepare(recipe(tmp_path))
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_second_run_does_nothing_and_other_terms_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_corpus(tmp_path, 6)
    write_processor(tmp_path)
    manifest = prepare(recipe(tmp_path))
    written = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")}
    shutil.rmtree(tmp_path / "images")  # whatever looked at a row again would fail
    assert prepare(recipe(tmp_path)) == manifest
    assert "already prepared (6 rows); nothing to do" in capsys.readouterr().out
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").rglob("*")} == written
    with pytest.raises(PlanError, match=r"layout: was 'chat', now 'caption'; chunk_rows: was 5, now 2"):
        prepare(recipe(tmp_path, layout="caption", chunk_rows=2))
    path.write_text(path.read_text() + json.dumps(row(6)) + "\n")
    with pytest.raises(PlanError, match=r"source 'corpus' \(\S+corpus\.jsonl\): fingerprint: was"):
        prepare(recipe(tmp_path))


def test_several_sources_with_limits_keep_their_order(tmp_path: Path) -> None:
    write_processor(tmp_path)
    sources = []
    for name, limit in (("b", 3), ("a", None)):
        path = write_corpus(tmp_path / name, 4, f"{name}.json")
        sources.append({"path": str(path), "image_root": str(path.parent), "limit": limit})
    prepare(recipe(tmp_path, sources=sources, chunk_rows=2))
    dataset = ShardedDataset(str(tmp_path / "out"))
    keys = [dataset.read(number)["key"] for number in range(len(dataset))]
    assert keys == ["b:0", "b:1", "b:2", "a:0", "a:1", "a:2", "a:3"]


def test_dry_run_counts_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path, 12)
    write_processor(tmp_path)
    assert prepare(recipe(tmp_path, dry_run=True)) is None
    out = capsys.readouterr().out
    assert "12 rows in 3 chunks, images as pixels\n" in out
    assert f"corpus: 12 rows of {tmp_path / 'corpus.jsonl'}" in out
    assert not (tmp_path / "out").exists()
    prepare(recipe(tmp_path))
    (tmp_path / "out" / "manifest.json").unlink()
    next((tmp_path / "out" / "receipts").iterdir()).unlink()
    capsys.readouterr()
    assert prepare(recipe(tmp_path, dry_run=True)) is None
    assert "2 of 3 chunks are done already\n" in capsys.readouterr().out


def test_empty_corpus_and_broken_file_are_errors(tmp_path: Path) -> None:
    write_processor(tmp_path)
    for content, message in (
        ("[]", r"source 'corpus'.*holds no rows"),
        ('[{"id": 1}', "corpus.json: the array is not"),
    ):
        (tmp_path / "corpus.json").write_text(content)
        with pytest.raises(ValueError, match=message):
            prepare(recipe(tmp_path, tmp_path / "corpus.json"))
    assert not (tmp_path / "out").exists()


def test_chunk_that_fails_stops_the_run_and_keeps_the_rest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_corpus(tmp_path, 12)
    write_processor(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "shards").write_text("a file where the folder of shards belongs")
    with pytest.raises(OSError, match="shards"):
        prepare(recipe(tmp_path))
    (tmp_path / "out" / "shards").unlink()
    manifest = prepare(recipe(tmp_path))
    assert manifest is not None and manifest == Manifest.load(str(tmp_path / "out"))
    assert manifest.written == 12


def test_workers_share_the_images_that_rows_repeat(tmp_path: Path) -> None:
    """Workers may meet an image at the same time; one object comes of it all the same."""
    rows = [row(number) | {"image": f"images/{number % 2}.jpg"} for number in range(30) if number % 4 != 3]
    write_corpus(tmp_path, rows)
    write_processor(tmp_path)
    own, shared = (
        prepare(recipe(tmp_path, output=str(tmp_path / name), share_images=share, chunk_rows=2))
        for name, share in (("own", False), ("shared", True))
    )
    assert own is not None and shared is not None and own.written == shared.written == len(rows)
    assert len([path for path in (tmp_path / "shared" / "images").rglob("*") if path.is_file()]) == 2
    first, second = (ShardedDataset(str(tmp_path / name)) for name in ("own", "shared"))
    for index in range(len(rows)):
        np.testing.assert_array_equal(first.read(index)["pixel_values"], second.read(index)["pixel_values"])
