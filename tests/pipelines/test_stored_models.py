"""Plans and receipts that were cut, or are something else: named in one line, and what that line says helps."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs import annotate, prepare
from pipelines import prepare as prepare_module
from pipelines.annotation.ledger import AnnotationManifest
from pipelines.annotation.verify import verify
from pipelines.preparation.sources import PlanError
from pipelines.shards import Manifest
from pipelines.stored_models import StoredModelError
from tests.annotation import annotate_here, annotate_settings
from tests.annotation import begin as begin_annotation
from tests.corpus import write_corpus, write_processor
from tests.preparation import begin, do_chunk, prepare_here, prepare_settings

DAMAGE = {"cut": "Invalid JSON: EOF while parsing", "rubbish": "Invalid JSON: expected value", "{}": ": Field required"}
RECEIPT_REMEDY = "remove it, and manifest.json where there is one, and run the job again: its chunk alone is then done"


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Ten rows in three chunks."""
    write_corpus(tmp_path, 10)
    write_processor(tmp_path)
    return tmp_path


def damage(path: Path, how: str) -> None:
    path.write_text(path.read_text()[:-20] if how == "cut" else how)


def check_line(error: str, start: str, fault: str, remedy: str) -> None:
    assert error.startswith(start) and fault in error and remedy in error, error
    assert error.count("\n") == 1, error


@pytest.mark.parametrize("how", DAMAGE)
def test_each_command_names_a_damaged_receipt(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    expected = prepare_here(prepare_settings(corpus))
    receipt, out = corpus / "out" / "receipts" / "00000001.json", str(corpus / "out")
    damage(receipt, how)
    capsys.readouterr()
    for arguments in (["gc", out], ["inspect", out, "--key", "corpus:5"], ["verify", out]):
        assert prepare.main(arguments) == 1
        check_line(capsys.readouterr().err, f"error: {receipt}: not a receipt: ", DAMAGE[how], RECEIPT_REMEDY)
    (corpus / "out" / "manifest.json").unlink()
    monkeypatch.setattr(prepare_module, "start_ray", lambda: None)
    assert prepare.main(["--config", f"{out}/config.yaml"]) == 1
    check_line(capsys.readouterr().err, f"error: {receipt}: not a receipt: ", DAMAGE[how], RECEIPT_REMEDY)
    receipt.unlink()
    ledger, _ = begin(prepare_settings(corpus))
    assert ledger.pending == [1]
    assert prepare_here(prepare_settings(corpus)) == expected


def test_receipt_that_another_driver_left_damaged_is_named(corpus: Path) -> None:
    ledger, maker = begin(prepare_settings(corpus))
    (corpus / "out" / "receipts").mkdir()
    (corpus / "out" / "receipts" / "00000000.json").write_text("{")
    with pytest.raises(StoredModelError, match=r"receipts/00000000\.json: not a receipt: Invalid JSON"):
        ledger.commit(do_chunk(ledger, maker, 0))


@pytest.mark.parametrize("how", DAMAGE)
def test_damaged_plan_is_named_and_the_same_one_takes_its_place(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    expected = prepare_here(prepare_settings(corpus, output=f"{corpus}/whole"))
    settings = prepare_settings(corpus)
    ledger, maker = begin(settings)
    for number in (0, 1):
        ledger.commit(do_chunk(ledger, maker, number))
    plan = corpus / "out" / "plan.json"
    before = plan.read_bytes()
    damage(plan, how)
    monkeypatch.setattr(prepare_module, "start_ray", lambda: pytest.fail("it went on"))
    capsys.readouterr()
    config = f"{corpus}/out/config.yaml"
    for arguments in (["--config", config], ["gc", str(corpus / "out"), "--older-than", "0"]):
        assert prepare.main(arguments) == 1
        error, remedy = capsys.readouterr().err, "restore it, or choose another output"
        check_line(error, f"error: {plan}: not a plan of this job: ", DAMAGE[how], remedy)
    plan.unlink()
    assert begin(settings)[0].pending == [2]
    assert plan.read_bytes() == before
    assert prepare_here(settings) == expected


def test_damaged_plan_of_a_finished_dataset_is_named(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = prepare_here(prepare_settings(corpus))
    plan, out = corpus / "out" / "plan.json", str(corpus / "out")
    damage(plan, "cut")
    capsys.readouterr()
    for arguments in (["verify", out], ["inspect", out, "--key", "corpus:5"]):
        assert prepare.main(arguments) == 1
        check_line(capsys.readouterr().err, f"error: {plan}: not a plan of this job: ", DAMAGE["cut"], "may also be")
    plan.unlink()
    assert prepare_here(prepare_settings(corpus)) == expected == Manifest.load(out)


def test_other_inputs_than_those_of_a_lost_plan_leave_what_is_done_alone(corpus: Path) -> None:
    settings = prepare_settings(corpus)
    ledger, maker = begin(settings)
    ledger.commit(do_chunk(ledger, maker, 0))
    plan = corpus / "out" / "plan.json"
    before = plan.read_bytes()
    plan.unlink()
    done = {path: path.read_bytes() for name in ("shards", "receipts") for path in (corpus / "out" / name).iterdir()}
    with pytest.raises(PlanError, match=r"a receipt of plan .*; use another output"):
        begin(prepare_settings(corpus, layout="caption"))
    assert {path: path.read_bytes() for path in done} == done
    plan.write_bytes(before)
    assert begin(settings)[0].pending == [1, 2]


def test_an_annotation_names_its_damaged_plan_and_receipts(
    corpus: Path, tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (corpus / "model").symlink_to(tiny_checkpoint)
    settings = annotate_settings(corpus)
    expected = annotate_here(settings)
    plan, receipt = corpus / "out" / "plan.json", corpus / "out" / "receipts" / "00000001.json"
    before = plan.read_bytes()
    damage(plan, "cut")
    capsys.readouterr()
    assert annotate.main(["--config", f"{corpus}/out/config.yaml"]) == 1
    start = f"error: {plan}: not a plan of this job: "
    check_line(capsys.readouterr().err, start, DAMAGE["cut"], "restore it, or choose another output")
    assert [line.startswith(start[7:]) for line in verify(settings.output)] == [True]
    plan.unlink()
    damage(receipt, "cut")
    with pytest.raises(StoredModelError, match=f"{receipt}: not a receipt: Invalid JSON.*; {RECEIPT_REMEDY}"):
        begin_annotation(settings)
    assert plan.read_bytes() == before
    receipt.unlink()
    (corpus / "out" / "manifest.json").unlink()
    assert annotate_here(settings) == expected == AnnotationManifest.load(settings.output)


def test_a_folder_of_another_job_is_told_to_choose_another_output(corpus: Path, tiny_checkpoint: Path) -> None:
    (corpus / "model").symlink_to(tiny_checkpoint)
    begin(prepare_settings(corpus))
    message = r"plan\.json: not a plan of this job: terms\.model: Field required; .*choose another output"
    with pytest.raises(StoredModelError, match=message):
        begin_annotation(annotate_settings(corpus))
