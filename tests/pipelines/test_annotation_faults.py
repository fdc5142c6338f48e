"""An annotation that is killed, starved of disk or run twice: exactly one row per input after the next run.

Without Ray: the protocol is the same, and tests/jobs shows it with Ray.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from flashsloth.image_processing_flashsloth import decode_image
from pipelines import storage
from pipelines.annotation import chunks
from pipelines.annotation.answering import Question
from pipelines.annotation.ledger import AnnotationManifest
from pipelines.annotation.parts import Answered
from pipelines.annotation.pool import make_asker
from pipelines.annotation.verify import verify
from pipelines.device_errors import DeviceError
from pipelines.preparation.receipt_book import PublishError
from pipelines.preparation.sources import PlanError
from pipelines.serving.engine import Encoder, Prompt
from pipelines.serving.images import ImageStore
from tests.annotation import annotate_here, annotate_settings, annotator, begin, rows_of
from tests.corpus import encoded, row, write_corpus
from tests.fixtures.small_disk import SmallDisk
from tests.fixtures.tiny import build_processor
from tests.kills import Kill, run_apart, run_together
from tests.prompts import conversation

NUM_ROWS = 10
KEYS = [f"corpus:{number}" for number in range(NUM_ROWS)]
WRITES = [r"plan\.json", r"parts/", r"receipts/", r"manifest\.json"]
CASES = [
    *(("local", *case) for case in itertools.product(WRITES, ["before", "midway", "after"])),
    *(("s3", *case) for case in itertools.product(WRITES[1:3], ["before", "after"])),
]


@pytest.fixture
def corpus(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """Ten rows in three chunks, and the checkpoint."""
    write_corpus(tmp_path, NUM_ROWS)
    (tmp_path / "model").symlink_to(tiny_checkpoint)
    return tmp_path


def run(corpus: Path, output: str) -> tuple[AnnotationManifest, int]:
    """A run in this process: the manifest, and how many questions were asked."""
    asked = 0
    ask = chunks.ask

    def counted(*arguments: Any) -> Any:
        nonlocal asked
        asked += 1
        return ask(*arguments)

    chunks.ask = counted
    try:
        return annotate_here(annotate_settings(corpus, output=output)), asked
    finally:
        chunks.ask = ask


def names(output: str, folder: str) -> list[str]:
    found = storage.list_names(storage.join(output, folder))
    return [name for name in found if not name.endswith(".part")]


def check_one_row_each(output: str) -> None:
    rows = rows_of(output)
    assert [each["key"] for each in rows] == KEYS
    assert all(each["error"] is None and each["answer"] for each in rows)
    assert verify(output) == []


@pytest.mark.parametrize(
    ("place", "step", "when"),
    [pytest.param(*case, marks=[pytest.mark.s3] if case[0] == "s3" else [], id="-".join(case)) for case in CASES],
)
def test_killed_run_is_resumed(
    request: pytest.FixtureRequest, corpus: Path, tmp_path: Path, place: str, step: str, when: Any
) -> None:
    is_local = place == "local"
    output = str(tmp_path / "out") if is_local else request.getfixturevalue("s3_uri")
    env: dict[str, str] = {} if is_local else request.getfixturevalue("s3").env
    run_apart(run, corpus, output, kill=Kill(step, when), env=env)
    done = names(output, "parts/corpus")
    assert [each["key"] for each in rows_of(output)] == KEYS[: 4 * len(done)]  # at any time, none twice
    manifest, num_asked = run_apart(run, corpus, output, env=env)
    assert num_asked == NUM_ROWS - min(NUM_ROWS, 4 * len(done))  # what has a part is not asked again
    assert manifest == AnnotationManifest.load(output)
    check_one_row_each(output)


@pytest.mark.parametrize("place", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_two_runs_at_once_end_with_one_manifest(request: pytest.FixtureRequest, corpus: Path, place: str) -> None:
    env: dict[str, str] = {} if place == "local" else request.getfixturevalue("s3").env
    root = str(corpus) if place == "local" else request.getfixturevalue("s3_uri")
    output = storage.join(root, "out")
    first, second = run_together(2, run, corpus, output, env=env)
    assert first[0] == second[0] == AnnotationManifest.load(output)
    check_one_row_each(output)


def test_slower_worker_takes_the_part_that_is_there(corpus: Path) -> None:
    """Two drivers answer differently, as two kinds of machines may: the first is heard, by both."""
    settings = annotate_settings(corpus)
    first, second = begin(settings), begin(settings)

    class Echo:
        def __init__(self, text: str) -> None:
            self.text = text

        def prepare(self, question: Question) -> str:
            return self.text

        def ask(self, prompt: str) -> Future[Answered]:
            answer: Future[Answered] = Future()
            if prompt == "slow":  # by now the other one has written its part
                annotator(first, Echo("quick"))(0, first.plan.chunks[0])
            answer.set_result(Answered(prompt, "stop", 1, 1))
            return answer

        def close(self) -> None:
            pass

    receipt = annotator(second, Echo("slow"))(0, second.plan.chunks[0])
    assert receipt == annotator(first, Echo("later"))(0, first.plan.chunks[0])
    assert [each["answer"] for each in rows_of(settings.output)] == ["quick"] * 4


def test_full_disk_is_named_and_resumed(corpus: Path, small_disk: SmallDisk) -> None:
    settings = annotate_settings(corpus, output=str(small_disk.path / "out"))
    begin(settings)
    small_disk.resize("28k")  # the plan, the settings, a part or two
    with pytest.raises(
        OSError, match=rf"No space left on device: '{small_disk.path}/out/(parts/corpus|receipts)/0+\d\."
    ):
        annotate_here(settings)
    assert not storage.exists(f"{settings.output}/manifest.json")
    done = storage.list_names(f"{settings.output}/parts/corpus")
    assert 0 < len(done) < 3
    assert [each["key"] for each in rows_of(settings.output)] == KEYS[: 4 * len(done)]
    small_disk.resize("10m")
    annotate_here(settings)
    check_one_row_each(settings.output)


def test_more_than_the_allowed_share_of_errors_publishes_nothing(corpus: Path) -> None:
    write_corpus(corpus, [*(row(number) for number in range(8)), *[row(0, image="images/nowhere.jpg")] * 2])
    settings = annotate_settings(corpus)
    with pytest.raises(
        PublishError, match=r"2 of 10 rows are without an answer \(image_missing 2\).*example corpus:8: image_"
    ):
        annotate_here(settings)
    assert not storage.exists(f"{settings.output}/manifest.json")
    assert annotate_here(annotate_settings(corpus, max_error_share=0.2)).errors == {"image_missing": 2}


def test_corpus_that_changes_under_way_is_named(corpus: Path) -> None:
    ledger = begin(annotate_settings(corpus))
    with (corpus / "corpus.jsonl").open("a") as file:
        file.write("\n")
    with pytest.raises(PlanError, match=f"{corpus}/corpus.jsonl has changed since the plan was made"):
        annotator(ledger, None)(0, ledger.plan.chunks[0])  # type: ignore[arg-type]  # nothing is asked


def test_failing_device_is_nobodys_answer(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = annotate_settings(corpus)

    def broken(*arguments: Any) -> Any:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.serving.decoder.Decoder.decode", broken)
        with pytest.raises(DeviceError, match=r"the engine failed: .*CUDA error: an illegal memory access"):
            annotate_here(settings)
    assert names(settings.output, "parts/corpus") == []
    annotate_here(settings)
    check_one_row_each(settings.output)


def test_request_without_memory_fails_alone(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = annotate_settings(corpus)
    encode = ImageStore.encode
    picture = Encoder(build_processor()).prompt(conversation("?"), decode_image(encoded(5))).image_key

    def greedy(self: ImageStore, prompts: Sequence[Prompt]) -> Any:
        if any(prompt.image_key == picture for prompt in prompts):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, prompts)

    monkeypatch.setattr(ImageStore, "encode", greedy)
    assert annotate_here(settings).errors == {"engine_error": 1}
    rows = rows_of(settings.output)
    assert rows[5]["error"] == "engine_error: OutOfMemoryError: CUDA out of memory"
    assert [each["key"] for each in rows if each["answer"]] == KEYS[:5] + KEYS[6:]


def test_batch_stays_full_across_the_borders_of_chunks(corpus: Path) -> None:
    """Five rows to a chunk and four slots: chunk by chunk, five of eight slots would be in use on average."""
    write_corpus(corpus, 50)
    settings = annotate_settings(corpus, chunk_rows=5, max_tokens=40)
    ledger = begin(settings)
    asker: Any = make_asker(settings, ledger.plan.terms.model, "")
    batch = asker.engine._batch
    step, running = batch.step, []

    def counted() -> None:
        step()
        running.append(batch._batch_size)

    batch.step = counted
    annotate = annotator(ledger, asker)
    with ThreadPoolExecutor(3) as threads:
        receipts = list(threads.map(annotate, ledger.pending, ledger.plan.chunks))
    asker.close()
    assert [receipt.part.rows for receipt in receipts] == [5] * 10
    assert sum(running) / len(running) / 4 > 0.85
