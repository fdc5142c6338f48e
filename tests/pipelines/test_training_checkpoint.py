"""Checkpoints: what is wrong with a damaged one, and which run may go on from it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipelines.feed import Position
from pipelines.training.checkpoint import (
    CheckpointError,
    CheckpointManifest,
    FileEntry,
    Progress,
    RunIdentity,
    find_problem,
    read_manifest,
    refuse_changed_run,
    sha256_of,
)

IDENTITY = RunIdentity(
    data=["d"],
    seed=0,
    global_batch=8,
    length_group=8,
    train_parts=["pooling"],
    precision="fp32",
    start={"checkpoint": "aa"},
)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "run" / "step-00000004-aa"
    folder.mkdir(parents=True)
    entries = []
    for name in ("rank-0", "rank-1"):
        (folder / name).write_bytes(name.encode() * 100)
        digest = sha256_of(folder / name)
        entries.append(FileEntry(name=name, bytes=(folder / name).stat().st_size, sha256=digest))
    progress = Progress(step=4, position=Position(1, 2, 30))
    manifest = CheckpointManifest(progress=progress, updates=4, run=IDENTITY, world_size=2, files=entries)
    (folder / "checkpoint.json").write_text(manifest.model_dump_json())
    return folder


def problem_of(folder: Path) -> str | None:
    manifest = read_manifest(str(folder))
    return manifest if isinstance(manifest, str) else find_problem(folder, manifest.files)


def test_an_untouched_checkpoint_verifies_and_keeps_its_position(checkpoint):
    assert problem_of(checkpoint) is None
    read = CheckpointManifest.model_validate_json((checkpoint / "checkpoint.json").read_bytes())
    assert (read.progress, read.run) == (Progress(step=4, position=Position(1, 2, 30)), IDENTITY)


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda folder: (folder / "rank-1").unlink(), "rank-1 is missing"),
        (lambda folder: (folder / "rank-1").write_bytes(b"short"), "rank-1 has 5 bytes, 600 were written"),
        (lambda folder: (folder / "rank-1").write_bytes(b"x" * 600), "rank-1 has sha256"),
        (lambda folder: (folder / "checkpoint.json").unlink(), "was never completed"),
        (lambda folder: (folder / "checkpoint.json").write_text('{"version": 2'), "checkpoint.json is damaged"),
    ],
)
def test_damage_is_found_and_named(checkpoint, damage, problem):
    damage(checkpoint)
    assert problem in problem_of(checkpoint)


def test_a_run_is_not_continued_with_other_settings(checkpoint):
    refuse_changed_run(str(checkpoint.parent), IDENTITY)
    changed = IDENTITY.model_copy(update={"precision": "bf16", "seed": 1})
    with pytest.raises(CheckpointError, match=r"seed was 0 and is now 1; precision was 'fp32' and is now 'bf16'"):
        refuse_changed_run(str(checkpoint.parent), changed)
    other = IDENTITY.model_copy(update={"start": {"checkpoint": "bb"}})
    with pytest.raises(CheckpointError, match=r"start was {'checkpoint': 'aa'} and is now {'checkpoint': 'bb'}\. Undo"):
        refuse_changed_run(str(checkpoint.parent), other)
    refuse_changed_run(str(checkpoint.parent / "elsewhere"), changed)


def test_the_checkpoint_manifest_is_plain_json(checkpoint):
    assert json.loads((checkpoint / "checkpoint.json").read_text())["progress"]["position"] == {
        "epoch": 1,
        "batch": 2,
        "samples_seen": 30,
    }
