"""Parts that are lost or damaged after their receipts were put: answered anew, and published under their own hashes.

The answers are other ones each time, as those of another kind of machine may be. Without Ray and without a model.
"""

from __future__ import annotations

import json
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest

from pipelines import storage
from pipelines.annotate import annotate
from pipelines.annotation.answering import Question
from pipelines.annotation.ledger import AnnotationLedger, AnnotationManifest
from pipelines.annotation.parts import Answered
from pipelines.annotation.verify import verify
from pipelines.preparation.receipt_book import PublishError
from pipelines.records import FileFormatError
from pipelines.shards.manifest import MANIFEST_NAME
from tests.annotation import annotate_settings, annotator, attempted, begin
from tests.corpus import write_corpus
from tests.kills import Kill, run_apart, run_together
from tests.pipelines.test_prepare_ledger import damage

KEYS = [f"corpus:{number}" for number in range(10)]
DAMAGES = {"lost": None, "cut": -10, "empty": 0}  # bytes that are left
PLACES = ["local", pytest.param("s3", marks=pytest.mark.s3)]


class Echo:
    """Answers every question with the same text."""

    def __init__(self, text: str) -> None:
        self.text = text

    def prepare(self, question: Question) -> str:
        return self.text

    def ask(self, prompt: str) -> Future[Answered]:
        answer: Future[Answered] = Future()
        answer.set_result(Answered(prompt, "stop", 1, 1))
        return answer

    def close(self) -> None:
        pass


@pytest.fixture
def corpus(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """Ten rows in three chunks, and the checkpoint."""
    write_corpus(tmp_path, len(KEYS))
    (tmp_path / "model").symlink_to(tiny_checkpoint)
    return tmp_path


def open_ledger(corpus: Path, output: str, format: str = "jsonl") -> AnnotationLedger:
    return begin(annotate_settings(corpus, output=output, format=format))


def answer(ledger: AnnotationLedger, text: str) -> None:
    """Do what is pending."""
    for number in ledger.pending:
        ledger.commit(attempted(ledger, annotator(ledger, Echo(text)), number))


def run(corpus: Path, output: str, text: str, format: str = "jsonl") -> AnnotationManifest:
    """A whole run."""
    ledger = open_ledger(corpus, output, format)
    answer(ledger, text)
    return ledger.publish()


def lose(output: str, number: int, left: int | None, format: str = "jsonl") -> None:
    """Damage the part of a chunk so that `left` bytes of it are left, as in a slice; None: so that it is gone."""
    uri = f"{output}/parts/corpus/{number:08d}.{format}"
    damage(uri, None if left is None else storage.read_bytes(uri)[:left])


def check_published(output: str, manifest: AnnotationManifest, answers: list[str]) -> None:
    """Every input has one row, of whatever is there, and `answers` says which for each chunk."""
    folder = storage.join(output, "parts", "corpus")
    names = [name for name in storage.list_names(folder) if not name.endswith(".part")]
    parts = [storage.read_bytes(storage.join(folder, name)).splitlines() for name in names]
    rows = [[json.loads(line) for line in lines] for lines in parts]
    assert [row["key"] for part in rows for row in part] == KEYS
    assert [{row["answer"] for row in part} for part in rows] == [{text} for text in answers]
    assert manifest == AnnotationManifest.load(output)
    assert verify(output) == []


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("text", ["again", "other length"])
@pytest.mark.parametrize("left", DAMAGES.values(), ids=DAMAGES)
def test_lost_part_is_answered_anew(
    request: pytest.FixtureRequest, corpus: Path, place: str, text: str, left: int | None
) -> None:
    output = str(corpus / "out") if place == "local" else request.getfixturevalue("s3_uri")
    answer(open_ledger(corpus, output), "first")
    lose(output, 1, left)
    check_published(output, run(corpus, output, text), ["first", text, "first"])


@pytest.mark.parametrize("left", DAMAGES.values(), ids=DAMAGES)
def test_lost_part_of_parquet_is_answered_anew(corpus: Path, left: int | None) -> None:
    output = str(corpus / "out")
    answer(open_ledger(corpus, output, "parquet"), "first")
    lose(output, 1, left, "parquet")
    assert run(corpus, output, "again", "parquet").rows == len(KEYS)
    assert verify(output) == []
    assert len(storage.list_names(f"{output}/parts/corpus")) == 3


def test_part_that_is_lost_twice_is_answered_twice(corpus: Path) -> None:
    output = str(corpus / "out")
    answer(open_ledger(corpus, output), "first")
    lose(output, 1, None)
    answer(open_ledger(corpus, output), "again")
    damage(f"{output}/parts/corpus/00000001-1.jsonl", b"cut")
    check_published(output, run(corpus, output, "third"), ["first", "third", "first"])
    assert json.loads(storage.read_bytes(f"{output}/receipts/00000001-2.json"))["attempt"] == 2


@pytest.mark.parametrize("when", ["before", "midway", "after"])
@pytest.mark.parametrize("step", ["parts/", "receipts/", r"manifest\.json"])
@pytest.mark.parametrize("left", [None, -10], ids=["lost", "cut"])
def test_run_that_answers_anew_may_be_killed(corpus: Path, left: int | None, step: str, when: Any) -> None:
    output = str(corpus / "out")
    answer(open_ledger(corpus, output), "first")
    lose(output, 1, left)
    run_apart(run, corpus, output, "again", kill=Kill(step, when), env={})
    is_answered = step != "parts/" or when == "after"
    manifest = run(corpus, output, "third")
    check_published(output, manifest, ["first", "again" if is_answered else "third", "first"])


@pytest.mark.parametrize("left", [None, -10], ids=["lost", "cut"])
def test_two_runs_at_once_answer_a_lost_part_with_one_voice(corpus: Path, left: int | None) -> None:
    output = str(corpus / "out")
    answer(open_ledger(corpus, output), "first")
    lose(output, 1, left)
    slow, quick = open_ledger(corpus, output), open_ledger(corpus, output)
    receipt = attempted(slow, annotator(slow, Echo("again")), 1)
    manifest = run(corpus, output, "third")
    answer(quick, "other")
    slow.commit(receipt)
    assert manifest == slow.publish() == quick.publish()
    check_published(output, manifest, ["first", "again", "first"])


def test_processes_at_once_answer_lost_parts_with_one_voice(corpus: Path) -> None:
    output = str(corpus / "out")
    answer(open_ledger(corpus, output), "first")
    for number in range(3):
        lose(output, number, -10 if number else None)
    first, second = run_together(2, run, corpus, output, "again", env={})
    assert first == second
    check_published(output, first, ["again"] * 3)


def test_part_that_is_lost_under_two_runs_is_published_by_none_of_its_receipts(corpus: Path) -> None:
    output = str(corpus / "out")
    first, second = open_ledger(corpus, output), open_ledger(corpus, output)
    answer(first, "first")
    lose(output, 1, None)
    with pytest.raises(PublishError, match=r"00000001\.jsonl changed under way: .*receipts/00000001\.json .*both"):
        answer(second, "again")
    for path in ("parts/corpus/00000001.jsonl", "receipts/00000001.json"):
        damage(f"{output}/{path}", None)
    check_published(output, run(corpus, output, "third"), ["first", "third", "first"])


def test_rest_of_a_damaged_part_is_named_by_verify_until_a_run_removes_it(corpus: Path) -> None:
    output = str(corpus / "out")
    answer(open_ledger(corpus, output), "first")
    lose(output, 1, -10)
    rest = storage.read_bytes(f"{output}/parts/corpus/00000001.jsonl")
    manifest = run(corpus, output, "again")
    own = f"{output}/parts/corpus/own-1.jsonl"
    for uri in (f"{output}/parts/corpus/00000001.jsonl", own):
        storage.write_bytes(uri, rest)
    [line] = verify(output)
    assert line.startswith(f"{output}/parts/corpus/00000001.jsonl: its chunk was done anew; run the job again")
    settings = annotate_settings(corpus, output=output, format="jsonl")
    annotate(settings.model_copy(update={"dry_run": True}))
    assert verify(output) == [line]
    assert annotate(settings) == manifest
    assert storage.read_bytes(own) == rest
    damage(own, None)
    check_published(output, manifest, ["first", "again", "first"])


def test_damaged_part_without_a_receipt_is_named_with_what_helps(corpus: Path) -> None:
    output = str(corpus / "out")
    ledger = open_ledger(corpus, output)
    attempted(ledger, annotator(ledger, Echo("first")), 1)
    lose(output, 1, -10)
    with pytest.raises(FileFormatError, match=r"parts/corpus/00000001\.jsonl: not a part .*; remove it and run"):
        run(corpus, output, "again")
    assert not storage.exists(f"{output}/{MANIFEST_NAME}")
    lose(output, 1, None)
    run(corpus, output, "again")
    assert verify(output) == []
