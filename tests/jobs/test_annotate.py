"""jobs/annotate.py on Ray: actors, a node and drivers are killed, a service answers, and the output is prepared."""

from __future__ import annotations

import os
import signal
from fnmatch import fnmatch
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import ray.cluster_utils
import yaml

from jobs.annotate import main
from jobs.prepare import main as prepare
from pipelines import storage
from pipelines.annotate import annotate
from pipelines.annotation import pool
from pipelines.annotation.ledger import AnnotationManifest
from pipelines.annotation.parts import part_name
from pipelines.annotation.pool import AnnotationWorker
from pipelines.annotation.settings import AnnotateSettings
from pipelines.annotation.verify import verify
from pipelines.preparation.settings import PrepareSettings
from pipelines.ray_tasks import CrashError
from pipelines.settings import dump_settings, load_settings
from pipelines.shards import ShardedDataset
from tests.annotation import annotate_here, annotate_settings, rows_of
from tests.corpus import row, write_corpus, write_processor
from tests.fixtures.ray_session import SMALL_STORE
from tests.kills import Blocked, start_driver, wait
from tests.preparation import prepare_settings

REPOSITORY = Path(__file__).parents[2]
NUM_ROWS = 24
KEYS = [f"corpus:{number}" for number in range(NUM_ROWS)]


@pytest.fixture
def corpus(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """Six chunks of four rows, and the checkpoint."""
    write_corpus(tmp_path, [row(number) for number in range(NUM_ROWS)])
    (tmp_path / "model").symlink_to(tiny_checkpoint)
    return tmp_path


def num_parts(output: str) -> int:
    return sum(name.endswith(".parquet") for name in storage.list_names(f"{output}/parts/corpus"))


def modified(output: str) -> dict[Path, int]:
    """The parts, and when each was written."""
    return {path: path.stat().st_mtime_ns for path in Path(output, "parts", "corpus").glob("*.parquet")}


def check_one_row_each(output: str) -> None:
    rows = rows_of(output)
    assert [each["key"] for each in rows] == KEYS
    assert all(each["error"] is None and each["answer"] for each in rows)
    assert verify(output) == []


def workers(raylet: psutil.Process) -> list[psutil.Process]:
    """The processes of the pool's actors: Ray says so in their title."""
    found = []
    for process in raylet.children(recursive=True):
        try:
            if process.cmdline()[:1] and "MapWorker" in process.cmdline()[0]:
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def test_recipe_of_the_repository_is_valid() -> None:
    settings = load_settings(AnnotateSettings, ["--config", str(REPOSITORY / "jobs" / "recipes" / "caption.yaml")])
    assert settings.sources[0].format == "images"


def test_recipe_of_the_repository_says_where_its_captions_are_read() -> None:
    text = (REPOSITORY / "jobs" / "recipes" / "caption.yaml").read_text()
    settings, [images] = AnnotateSettings(**yaml.safe_load(text)), yaml.safe_load(text)["sources"]
    [comment] = [line for line in text.splitlines() if "path:" in line and line.startswith("#")]
    source = yaml.safe_load(comment.removeprefix("#"))
    part = part_name(images["name"], 0, settings.format)
    assert fnmatch(storage.join(settings.output, part), source["path"])
    assert (source["format"], source["image_root"]) == ("parquet", images["image_root"])
    PrepareSettings(sources=[source], output="out", processor="processor", layout="caption")


def test_mistakes_are_named_in_one_line(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = corpus / "recipe.yaml"
    recipe.write_text(dump_settings(annotate_settings(corpus, checkpoint=str(corpus / "nowhere"))))
    assert main(["--config", str(recipe)]) == 1
    assert capsys.readouterr().err == (
        f"error: {corpus}/nowhere: no such folder; name the folder that training exported\n"
    )
    recipe.write_text(dump_settings(annotate_settings(corpus, sources=[{"path": str(corpus / "none.jsonl")}])))
    assert main(["--config", str(recipe)]) == 1
    assert capsys.readouterr().err == f"error: source 'none': {corpus}/none.jsonl cannot be read (FileNotFoundError)\n"
    assert main(["verify", str(corpus)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {corpus}: no manifest.json here: this is no annotation")
    assert not (corpus / "out").exists()


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_captions_of_a_model_are_prepared_for_its_next_training(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loop: annotate, prepare what came out; run again, nothing is done."""
    recipe = corpus / "annotate.yaml"
    recipe.write_text(dump_settings(annotate_settings(corpus, prompt="Describe it: {question}", chunk_rows=12)))
    assert main(["--config", str(recipe), "--dry-run"]) == 0
    assert "24 rows in 2 chunks, answers as parquet\n" in capsys.readouterr().out
    assert not (corpus / "out").exists()
    assert main(["--config", str(recipe)]) == 0
    out = capsys.readouterr().out
    assert f"{corpus}/out/parts: 24 rows in 2 parts, " in out
    assert "24 of 24 rows (100.0%), " in out and " tokens/s, 0 without an answer\n" in out
    check_one_row_each(str(corpus / "out"))
    assert main(["verify", str(corpus / "out")]) == 0
    assert "one row for every input" in capsys.readouterr().out
    assert main(["--config", str(recipe)]) == 0
    assert "already annotated (24 rows); nothing to do\n" in capsys.readouterr().out

    write_processor(corpus)
    source = {"path": f"{corpus}/out/parts/corpus/*.parquet", "format": "parquet", "name": "captions"}
    source["image_root"] = str(corpus)
    (corpus / "prepare.yaml").write_text(
        dump_settings(prepare_settings(corpus, sources=[source], output=str(corpus / "shards"), chunk_rows=12))
    )
    assert prepare(["--config", str(corpus / "prepare.yaml")]) == 0
    dataset = ShardedDataset(str(corpus / "shards"))
    assert len(dataset) == NUM_ROWS
    answers = {each["key"]: each["answer"] for each in rows_of(str(corpus / "out"))}
    for index in range(NUM_ROWS):
        sample = dataset.read(index)
        assert sample["messages"][-1] == {"role": "assistant", "content": answers[KEYS[index]]}
        assert ("pixel_values" in sample) == (index % 4 != 3)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_part_that_is_damaged_before_all_is_published_is_answered_anew(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = annotate_settings(corpus, chunk_rows=12)
    output, recipe = settings.output, corpus / "annotate.yaml"
    recipe.write_text(dump_settings(settings))
    assert main(["--config", str(recipe)]) == 0
    Path(output, "manifest.json").unlink()
    part = Path(output, "parts", "corpus", "00000001.parquet")
    part.write_bytes(part.read_bytes()[:-10])
    assert main(["--config", str(recipe)]) == 0
    assert f"done anew: 1 of 2 chunks, such as that of {part}: " in capsys.readouterr().out
    check_one_row_each(output)
    assert storage.list_names(f"{output}/parts/corpus") == ["00000000.parquet", "00000001-1.parquet"]


@pytest.mark.ray
def test_pool_grows_and_killed_actor_and_node_cost_no_row_and_double_none(
    corpus: Path, two_nodes: ray.cluster_utils.Cluster
) -> None:
    """An actor dies amid a chunk, then, under the ones that took over, their node."""
    settings = annotate_settings(corpus, workers={"min_workers": 1, "max_workers": 2})
    image = Blocked(corpus / "images" / "1.jpg", 1)
    [node] = two_nodes.worker_nodes
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    driver = start_driver("annotate", settings, corpus, two_nodes.address)
    try:
        [first] = wait(lambda: workers(raylet)[:1], "an actor", 180)
        # It has three chunks and cannot go on with the first of them: only another one can do the rest.
        wait(lambda: num_parts(settings.output) == 3, "the chunks that the first actor has not begun", 180)
        known = {actor.pid for actor in workers(raylet)}
        assert len(known) == 2 and first.pid in known
        first.kill()
        wait(lambda: {actor.pid for actor in workers(raylet)} - known, "a third actor", 180)
        assert driver.poll() is None and not storage.exists(f"{settings.output}/manifest.json")
        kept = modified(settings.output)
        assert 3 <= len(kept) < 6

        actors = workers(raylet)
        image.release()
        raylet.kill()
        for actor in actors:  # it ends by itself where its raylet is lost, but not while it waits for a pipe
            actor.kill()
        two_nodes.add_node(num_cpus=1, object_store_memory=SMALL_STORE)
        out, _ = driver.communicate(timeout=240)
    finally:
        driver.kill()
    assert driver.returncode == 0, out
    check_one_row_each(settings.output)
    assert modified(settings.output).items() >= kept.items()  # their rows were not asked again


@pytest.mark.ray
@pytest.mark.usefixtures("ray_session")
def test_killed_drivers_cost_no_row_and_double_none(corpus: Path) -> None:
    """Two at once, on one output; another finishes."""
    settings = annotate_settings(corpus)
    address = ray.get_runtime_context().gcs_address
    for driver in [start_driver("annotate", settings, corpus, address, r"receipts/", "after") for _ in range(2)]:
        out, _ = driver.communicate(timeout=240)
        assert driver.returncode == -signal.SIGKILL, out
    assert not storage.exists(f"{settings.output}/manifest.json")
    kept = modified(settings.output)
    assert kept
    assert annotate(settings) is not None
    check_one_row_each(settings.output)
    assert modified(settings.output).items() >= kept.items()  # their rows were not asked again


def test_parts_are_plain_parquet(corpus: Path) -> None:
    """Columns that any reader understands: no pickled objects, no extension types."""
    manifest: AnnotationManifest = annotate_here(annotate_settings(corpus))
    schema = pq.read_schema(corpus / "out" / manifest.parts[0].name)
    assert schema.names == [
        *("key", "id", "source", "answer", "finish_reason", "prompt_tokens", "answer_tokens", "model", "error"),
        *("messages", "image"),
    ]
    assert not [field for field in schema if "extension" in str(field.type)]


@pytest.mark.usefixtures("ray_session")
def test_a_row_that_kills_its_worker_ends_the_run_and_may_be_one_of_few(
    corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Deadly(AnnotationWorker):
        def __call__(self, chunks: pa.Table) -> pa.Table:
            if 2 in chunks["number"].to_pylist():
                os._exit(139)  # as after a segmentation fault
            return super().__call__(chunks)

    monkeypatch.setattr(pool, "AnnotationWorker", Deadly)
    settings = annotate_settings(corpus, workers={"min_workers": 1, "max_workers": 1})
    with pytest.raises(CrashError, match=r"chunks of 4 rows: .*'corpus' from row 8 \(line 9\) on.*chunk_rows: 1"):
        annotate(settings)
    assert not storage.exists(f"{settings.output}/manifest.json")
