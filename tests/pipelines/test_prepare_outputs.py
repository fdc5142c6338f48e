"""Outputs that cannot be written: named before anything is planned, and nothing is left where nothing was asked for."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any, NoReturn

import pytest

from pipelines import annotate as annotate_module
from pipelines import prepare as prepare_module
from pipelines import storage
from pipelines.annotate import annotate
from pipelines.preparation.outputs import check_writable
from pipelines.preparation.settings import PrepareSettings
from pipelines.preparation.sources import PlanError
from pipelines.prepare import prepare
from tests.annotation import annotate_settings
from tests.corpus import write_corpus, write_processor
from tests.fixtures.s3 import S3
from tests.fixtures.small_disk import SmallDisk
from tests.kills import run_apart
from tests.preparation import prepare_here, prepare_settings


class WentOnError(Exception):
    """The planning would begin now."""


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_corpus(tmp_path, 4)
    write_processor(tmp_path)

    def go_on() -> NoReturn:
        raise WentOnError

    for module in (prepare_module, annotate_module):
        monkeypatch.setattr(module, "start_ray", go_on)
    return tmp_path


def attempt(settings: PrepareSettings) -> None:
    """What another user's process does."""
    check_writable(settings.output, settings)


@pytest.mark.parametrize("below", ["", "/below"])
def test_an_output_that_is_a_file_is_named(corpus: Path, below: str) -> None:
    file = corpus / "corpus.jsonl"
    message = rf"output: {file}{below}: nothing can be written there \({file} is a file\); choose another output"
    with pytest.raises(PlanError, match=message):
        prepare(prepare_settings(corpus, output=f"{file}{below}"))


@pytest.mark.s3
def test_a_bucket_that_does_not_exist_is_named_before_the_planning(corpus: Path, s3: S3, tiny_checkpoint: Path) -> None:
    (corpus / "model").symlink_to(tiny_checkpoint)
    output = "s3://no-such-bucket/x"
    message = f"output: {output}: there is no such bucket; create it, or choose another output"
    with pytest.raises(PlanError, match=message):
        prepare(prepare_settings(corpus, output=output))
    with pytest.raises(PlanError, match=message):
        annotate(annotate_settings(corpus, output=output))


@pytest.mark.s3
def test_a_bucket_that_may_not_be_written_is_named(corpus: Path, s3: S3) -> None:
    output = storage.join(s3.new_bucket(acl="public-read"), "out")
    message = rf"PlanError: output: {output}: nothing can be written there \(Permission denied.*\); open it to this"
    with pytest.raises(RuntimeError, match=message):
        run_apart(attempt, prepare_settings(corpus, output=output), env=s3.stranger)
    assert storage.list_names(output) == []


@pytest.mark.s3
def test_a_dry_run_writes_nothing_and_a_planned_output_is_not_asked(corpus: Path, s3_uri: str) -> None:
    output = storage.join(s3_uri, "out")
    with pytest.raises(WentOnError):
        prepare(prepare_settings(corpus, output=output, dry_run=True))
    assert storage.list_names(s3_uri) == []
    with pytest.raises(WentOnError):
        prepare(prepare_settings(corpus, output=output))
    assert storage.list_names(output) == ["config.yaml"]
    prepare_here(prepare_settings(corpus, output=output, max_quarantined_share=0.3))
    assert b"max_quarantined_share: 0.3" in storage.read_bytes(storage.join(output, "config.yaml"))


def read_only(disk: SmallDisk) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk.path)], check=True)


@pytest.mark.parametrize("below", ["", "new/out"])
def test_a_disk_that_may_not_be_written_is_named_before_the_planning(
    corpus: Path, small_disk: SmallDisk, tiny_checkpoint: Path, below: str
) -> None:
    (corpus / "model").symlink_to(tiny_checkpoint)
    read_only(small_disk)
    output = storage.join(str(small_disk.path), below)
    runs: list[tuple[Any, Any]] = [(prepare, prepare_settings), (annotate, annotate_settings)]
    for run, settings in runs:
        with pytest.raises(PlanError) as raised:
            run(settings(corpus, output=output))
        assert str(raised.value) == (
            f"output: {storage.resolve(output)}: nothing can be written there ({small_disk.path} may not be written); "
            "open it to this user, or choose another output"
        )
        with pytest.raises(WentOnError):
            run(settings(corpus, output=output, dry_run=True))


def test_asking_leaves_no_folder_behind(corpus: Path) -> None:
    with pytest.raises(WentOnError):
        prepare(prepare_settings(corpus))
    assert not (corpus / "out").exists()
