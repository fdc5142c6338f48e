"""jobs/prepare.py as it is run: exit codes and messages, from S3 to S3, verified."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from flashsloth import FlashSlothProcessor
from flashsloth.image_processing_flashsloth import decode_image
from jobs.prepare import main
from pipelines import storage
from pipelines.preparation.settings import PrepareSettings
from pipelines.settings import load_settings
from pipelines.shards import Manifest, ShardedDataset
from tests.corpus import bad_rows, encoded, row, write_corpus, write_processor

REPOSITORY = Path(__file__).parents[2]


def write_recipe(folder: Path, **change: Any) -> str:
    base = {
        "sources": [{"path": str(folder / "corpus.jsonl"), "image_root": str(folder)}],
        "output": str(folder / "out"),
        "processor": str(folder / "processor"),
        "chunk_rows": 4,
    }
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(base | change))
    return str(path)


def stamps(folder: Path) -> dict[Path, int]:
    """The files below `folder`, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def start(recipe: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "jobs/prepare.py", "--config", recipe]
    env = {**os.environ, **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=REPOSITORY, env=env, start_new_session=True, **pipes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"payloads": "pixels"}, "recipe.yaml: unknown field 'payloads'; did you mean 'payload'?"),
        ({"layout": "captions"}, "recipe.yaml: layout: "),
        ({"sources": [{"path": "a.json", "format": "llama"}]}, "no such corpus format; there are: images, llava"),
        ({"sources": [{"path": "a/x.json"}, {"path": "b/x.json"}]}, "two sources have the name 'x'; rows are"),
        ({"sources": [{"path": "x.json", "name": n} for n in "ab"]}, "two sources have the path 'x.json'; list each"),
        ({"sources": [{"path": "a.json", "image_rot": "x"}]}, "recipe.yaml: unknown field 'sources.0.image_rot'; did"),
        ({"sources": [{"path": "a.json"}, {"weight": 2}]}, "recipe.yaml: 'sources.1.path' is required\n"),
        ({"sources": [{"path": "a.json"}, {"path": "b.json", "weight": 0}]}, "recipe.yaml: sources.1.weight: "),
        ({"sources": [{"path": ""}]}, "recipe.yaml: sources.0.path: "),
        ({"output": ""}, "recipe.yaml: output: "),
        ({"payload": "features"}, "payload 'features' needs an encoder"),
        ({"payload": "features", "encoder": {"path": "x", "dtype": "int4"}}, "encoder.dtype: "),
        (
            {"payload": "features", "encoder": {"path": "x", "min_workers": 3, "max_workers": 2}},
            "min_workers is 3, more than max_workers 2",
        ),
        ({"sources": []}, "sources: "),
        ({"processor": None}, "exactly one of processor and tokenizer"),
        ({"tiling": "hd"}, "tiling goes with tokenizer"),
    ],
)
def test_mistake_in_a_recipe_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--config", write_recipe(tmp_path, **change)])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_recipe_that_names_its_sources_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = Path(write_recipe(tmp_path))
    recipe.write_text(recipe.read_text() + "sources:\n- {path: more.json}\n")
    with pytest.raises(SystemExit, match="2"):
        main(["--config", str(recipe)])
    error = capsys.readouterr().err
    assert f"{recipe}: this recipe is no valid YAML: 'sources' stands twice" in error


@pytest.mark.parametrize(
    ("names", "layout", "payload", "tiling"),
    [
        (["prepare-llava-pretrain"], "caption", "pixels", None),
        (["prepare-llava-instruct"], "chat", "pixels", None),
        (["prepare-llava-instruct", "prepare-llava-instruct-hd"], "chat", "original", "hd"),
    ],
)
def test_recipes_of_the_repository_are_valid(names: list[str], layout: str, payload: str, tiling: str | None) -> None:
    flags = [flag for name in names for flag in ("--config", str(REPOSITORY / "jobs" / "recipes" / f"{name}.yaml"))]
    settings = load_settings(PrepareSettings, flags)
    assert (settings.layout, settings.payload, settings.tiling) == (layout, payload, tiling)


def test_missing_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path)
    assert main(["--config", recipe]) == 1
    assert capsys.readouterr().err.startswith(f"error: processor: {tmp_path / 'processor'} holds no FlashSloth")
    write_processor(tmp_path)
    assert main(["--config", recipe]) == 1
    assert (
        capsys.readouterr().err
        == f"error: source 'corpus': {tmp_path / 'corpus.jsonl'} cannot be read (FileNotFoundError)\n"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_an_error_of_planning_is_one_line_that_names_source_and_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_processor(tmp_path)
    no_array, cut = tmp_path / "no-array.json", tmp_path / "cut.json"
    no_array.write_text('{"rows": []}')
    cut.write_text('[{"id": 1},')
    gone = {"path": str(write_corpus(tmp_path, 1)), "image_root": "nowhere://bucket"}
    for source, message in (
        ({"path": str(no_array)}, f"source 'no-array': {no_array}: begins with b'{{\"rows\": []}}', not with '[': "),
        ({"path": str(cut)}, f"source 'cut': {cut}: the array is not closed: "),
        ({"path": str(cut), "format": "parquet"}, f"source 'cut': {cut}: no Parquet file: "),
        ({"path": str(cut), "format": "webdataset"}, f"source 'cut': {cut}: no tar, or a damaged one: "),
        ({"path": str(tmp_path), "name": "all"}, f"source 'all': {tmp_path} is a folder; for all of its files write "),
        (gone, "nowhere://bucket: nothing that is installed knows nowhere://"),
    ):
        assert main(["--config", write_recipe(tmp_path, sources=[source])]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {message}") and error.count("\n") == 1, error
    assert not (tmp_path / "out").exists()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_run_reports_and_verify_finds_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    write_corpus(tmp_path, [*(row(number) for number in range(11)), bad_rows(tmp_path)["image_truncated"]])
    write_processor(tmp_path)
    recipe = write_recipe(tmp_path)
    assert main(["--config", recipe, "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("dry run: nothing is written\n")
    assert main(["--config", recipe]) == 0
    out = capsys.readouterr().out
    assert "12 rows planned, 11 written in 3 shards, 1 quarantined\n  image_truncated: 1\n" in out
    assert "12 of 12 rows (100.0%), " in out and ", 1 quarantined\n" in out
    assert out.endswith(f"receipt {tmp_path / 'out' / 'receipt.html'}\n")
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["chunk_rows"] == 4
    assert main(["verify", str(tmp_path / "out")]) == 0
    assert "every shard is as it was written" in capsys.readouterr().out

    [first, second, _] = Manifest.load(str(tmp_path / "out")).shards
    (tmp_path / "out" / first.name).unlink()
    (tmp_path / "out" / second.name).write_bytes(b"x" * second.bytes)
    assert main(["verify", str(tmp_path / "out")]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert first.name in errors[0] and "found no such file" in errors[0]
    assert second.name in errors[1] and f"with sha256 {second.sha256}, found" in errors[1]

    # What the errors advise: only these two chunks are made again, and the manifest is the same.
    before, manifest = stamps(tmp_path / "out"), tmp_path / "out" / "manifest.json"
    published, receipts = manifest.read_bytes(), [Path(line.rpartition(". Its receipt: ")[2]) for line in errors]
    assert receipts == [tmp_path / "out" / "receipts" / f"0000000{chunk}.json" for chunk in (0, 1)]
    for path in (manifest, *receipts):
        path.unlink()
    assert main(["--config", recipe]) == 0
    assert manifest.read_bytes() == published
    after = stamps(tmp_path / "out")
    changed = {path for path in after if after[path] != before.get(path) and path.parent != tmp_path / "out"}
    assert changed == {*receipts, *(tmp_path / "out" / shard.name for shard in (first, second))}
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_verify_of_no_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(tmp_path)]) == 1
    assert "no manifest.json here" in capsys.readouterr().err


@pytest.mark.ray
@pytest.mark.s3
def test_from_s3_to_s3(tmp_path: Path, s3_uri: str) -> None:
    (tmp_path / "images").mkdir()
    path = write_corpus(tmp_path, [*(row(number) for number in range(11)), bad_rows(tmp_path)["image_missing"]])
    for file in (path, *(tmp_path / "images").iterdir()):
        storage.write_bytes(storage.join(s3_uri, "corpus", str(file.relative_to(tmp_path))), file.read_bytes())
    write_processor(tmp_path)
    corpus, output = storage.join(s3_uri, "corpus"), storage.join(s3_uri, "prepared")
    source = {"path": storage.join(corpus, "corpus.jsonl"), "image_root": corpus}
    driver = start(write_recipe(tmp_path, sources=[source], output=output))
    try:
        out, _ = driver.communicate(timeout=180)
    finally:
        _kill_session(driver)
    assert driver.returncode == 0, out
    assert "12 rows planned, 11 written in 3 shards, 1 quarantined\n  image_missing: 1\n" in out
    dataset = ShardedDataset(output, cache_dir=str(tmp_path / "cache"))
    processor = FlashSlothProcessor.from_pretrained(tmp_path / "processor")
    for number in range(11):
        read = dataset.read(number)
        assert read["key"] == f"corpus:{number}"
        if number % 4 != 3:
            pixels = processor.image_processor.to_uint8(decode_image(encoded(number)))
            np.testing.assert_array_equal(read["pixel_values"], pixels)
    assert storage.list_names(output) == [
        "config.yaml",
        "manifest.json",
        "pins",
        "plan.json",
        "quarantine.parquet",
        "receipt.html",
        "receipt.json",
        "receipts",
        "shards",
    ]


def _kill_session(process: subprocess.Popen[str]) -> None:
    """Whatever `process` started and left: it was the leader of a session of its own."""
    if process.stdout:
        process.stdout.close()
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()
