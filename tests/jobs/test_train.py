"""`jobs/train.py`: what it refuses before a worker starts, and a whole run against an object store."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flashsloth import FlashSlothImageProcessor, FlashSlothProcessor
from jobs.train import STOPPED_EXIT_CODE, main
from pipelines import storage
from pipelines.training.export import ExportError, fetch_export, load_export
from pipelines.training.run_log import read_metrics
from tests.prepared import coloured_rows, write_prepared

RECIPES = Path(__file__).parents[2] / "jobs" / "recipes"
OVERRIDES = {
    "text_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "vision_config": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1},
    "query_hidden_size": 16,
}


@pytest.fixture
def flags(processor, tmp_path) -> dict[str, str]:
    processor.save_pretrained(tmp_path / "processor")
    return {
        "config": str(RECIPES / "tiny-align.yaml"),
        "model.processor": str(tmp_path / "processor"),
        "model.overrides": json.dumps(OVERRIDES),
        "data.folders": write_prepared(tmp_path / "data", coloured_rows(12), processor, layout="caption"),
        "run.storage": str(tmp_path / "runs"),
    }


def words(flags: dict[str, str]) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", value)]


def refusal(flags: dict[str, str], capsys, status: int = 1) -> str:
    """What a run that must not start prints."""
    if status == 2:
        with pytest.raises(SystemExit) as exit_:
            main(words(flags))
        assert exit_.value.code == 2
    else:
        assert main(words(flags)) == status
    return capsys.readouterr().err


def test_a_typo_in_a_recipe_is_named_with_its_file(flags, tmp_path, capsys):
    typo = tmp_path / "typo.yaml"
    typo.write_text("optim: {learning_rat: 1.0e-3}\n")
    assert f"error: {typo}: unknown field 'optim.learning_rat'" in refusal(flags | {"config": str(typo)}, capsys, 2)


def test_a_global_batch_that_does_not_divide_is_refused_with_both_numbers(flags, capsys):
    said = refusal(flags | {"batch.global_size": "33"}, capsys, 2)
    assert "batch.global_size 33 is not divisible by 32 (batch.micro_size 16 x scaling.num_workers 2)" in said


def test_data_that_is_not_prepared_is_named(flags, tmp_path, capsys):
    said = refusal(flags | {"data.folders": str(tmp_path / "nowhere")}, capsys)
    assert f"error: {tmp_path}/nowhere: no manifest.json here" in said


def test_a_folder_that_is_no_checkpoint_is_named(flags, tmp_path, capsys):
    del flags["model.overrides"], flags["model.processor"]
    (tmp_path / "empty").mkdir()
    flags |= {"config": str(RECIPES / "tiny-instruct.yaml"), "model.checkpoint": str(tmp_path / "empty")}
    assert f"error: {tmp_path}/empty is no FlashSloth checkpoint: it lacks config.json" in refusal(flags, capsys)


def test_data_of_another_processor_is_refused_naming_both(flags, tokenizer, processor, tmp_path, capsys):
    other = FlashSlothProcessor(FlashSlothImageProcessor(size=126), tokenizer, num_image_tokens=9, query_separator="")
    other.save_pretrained(tmp_path / "other")
    said = refusal(flags | {"model.processor": str(tmp_path / "other")}, capsys)
    assert processor.identity()[:12] in said and other.identity()[:12] in said


def test_the_hd_recipe_refuses_features_naming_both(flags, processor, tmp_path, capsys):
    del flags["model.overrides"]
    features = write_prepared(tmp_path / "features", coloured_rows(2), processor, payload="features")
    flags |= {"config": str(RECIPES / "instruct-hd.yaml"), "model.checkpoint": "x", "data.folders": features}
    said = refusal(flags, capsys)
    assert "payload 'features'" in said and "trains the vision_tower" in said


@pytest.mark.ray
def test_more_workers_than_the_cluster_can_ever_give_are_refused_with_both_numbers(ray_session, flags, capsys):
    said = refusal(flags | {"scaling.num_workers": "8", "batch.global_size": "128"}, capsys)
    assert "8 workers with 1 CPU each, 8 in all; the cluster has at most 4 CPU" in said
    said = refusal(flags | {"scaling.gpus_per_worker": "1"}, capsys)
    assert "2 workers with 1 GPU each, 2 in all; the cluster has at most 0 GPU" in said


@pytest.mark.ray
@pytest.mark.s3
@pytest.mark.timeout(1200)
def test_a_run_on_an_object_store_saves_and_ends_at_sigterm_and_goes_on_from_there(s3_uri, flags, processor):
    """As anyone would run it: a process of its own, which starts its own cluster."""
    data = write_prepared(f"{s3_uri}/data", coloured_rows(12), processor, layout="caption")
    small = {"batch.global_size": "4", "batch.micro_size": "2", "run.log_every": "1", "run.checkpoint_every": "10"}
    flags |= {"data.folders": data, "run.storage": f"{s3_uri}/runs", "run.name": "far", **small}

    command = [sys.executable, str(RECIPES.parent / "train.py"), *words(flags | {"max_steps": "30"})]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as job:
        started = next(line for line in job.stdout if "checkpoint" in line)
        next(line for line in job.stdout if line.startswith("step "))
        job.send_signal(signal.SIGTERM)
        _, complaint = job.communicate(timeout=120)
    assert "no checkpoint yet: starting at step 0" in started
    assert job.returncode == STOPPED_EXIT_CODE == 75, complaint[-3000:]
    stopped = re.search(r"stopped at step (\d+) of 30, with a checkpoint of this step; run the same command", complaint)
    step = int(stopped[1])
    assert 0 < step < 30

    # It goes on with as many workers as there are then.
    command += ["--scaling.num_workers", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    spread = "written by 2 workers, loaded by 1"
    assert re.search(
        rf"resuming from \S+/runs/far/step-{step:08d}-\w+ \(step {step}, every file verified; {spread}", done.stdout
    )
    assert f"the model is in {s3_uri}/runs/far/export" in done.stdout
    assert [line["step"] for line in read_metrics(f"{s3_uri}/runs/far")] == list(range(1, 31))
    assert load_export(f"{s3_uri}/runs/far/export", torch.float32).config.text_config.hidden_size == 32
    storage.filesystem(s3_uri)[0].rm(f"{s3_uri}/runs/far/export/export.json")
    with pytest.raises(ExportError, match="no checkpoint, or its export was killed half-way"):
        fetch_export(f"{s3_uri}/runs/far/export")
