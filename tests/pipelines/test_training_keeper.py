"""Which checkpoints stay, which are evaluated, and which is the best; with an evaluator that needs no model."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from pipelines import storage
from pipelines.training.checkpoint import CheckpointManifest, Progress, RunIdentity, read_manifest, stored_names
from pipelines.training.export import ExportManifest
from pipelines.training.keeper import CheckpointKeeper, EvaluationFailed
from pipelines.training.scores import (
    LOG_NAME,
    Measure,
    Score,
    best_of,
    read_best,
    read_score,
    read_scores,
    readable,
    write_score,
)

IDENTITY = RunIdentity(
    data=["d"], seed=0, global_batch=8, length_group=8, train_parts=["projector"], precision="fp32", start={}
)
LOSS = Measure(data=["split"], max_rows=8, metric="loss", max_new_tokens=4)
EXACT = LOSS.model_copy(update={"metric": "exact_match"})


def add_checkpoint(run: Path, step: int) -> str:
    name = f"step-{step:08d}-{step:08x}"
    (run / name).mkdir(parents=True)
    manifest = CheckpointManifest(progress=Progress(step=step), updates=step, run=IDENTITY, world_size=1, files=[])
    (run / name / "checkpoint.json").write_text(manifest.model_dump_json())
    return name


def add_export(run: Path, step: int, name: str = "export") -> None:
    storage.write_bytes(f"{run}/{name}/export.json", ExportManifest(step=step, files={}).model_dump_json().encode())


def score(step: int, loss: float, measure: Measure = LOSS, manifest: str = "m", exact: float | None = None) -> Score:
    return Score(
        checkpoint=f"step-{step:08d}-{step:08x}",
        manifest=manifest,
        step=step,
        measure=measure,
        rows=8,
        loss_tokens=20,
        loss=loss,
        questions=None if exact is None else 10,
        exact_match=exact,
        seconds=1.0,
    )


class TableEvaluator:
    """Finds the losses that it is told, each when `ready` is set; a missing one is a failure."""

    def __init__(self, run: Path, losses: dict[int, float]) -> None:
        self.run = run
        self.losses = losses
        self.asked: list[int] = []
        self.exported: list[int] = []
        self.ready = threading.Event()
        self.ready.set()

    def evaluate(self, checkpoint: str) -> Score:
        manifest = read_manifest(f"{self.run}/{checkpoint}")
        assert isinstance(manifest, CheckpointManifest)
        self.asked.append(manifest.progress.step)
        assert self.ready.wait(10)
        if manifest.progress.step not in self.losses:
            raise EvaluationFailed("no luck")
        found = score(manifest.progress.step, self.losses[manifest.progress.step], manifest=manifest.fingerprint())
        write_score(str(self.run), found)
        return found

    def export(self, checkpoint: str, target: str) -> None:
        step = int(checkpoint.split("-")[1])
        self.exported.append(step)
        add_export(self.run, step, Path(target).name)

    def close(self) -> None:
        self.ready.set()


def keeper(run: Path, evaluator: TableEvaluator | None, **options: int) -> CheckpointKeeper:
    return CheckpointKeeper(str(run), 2, lambda count: count, evaluator, LOSS if evaluator else None, **options)


def steps(run: Path) -> list[int]:
    return sorted(int(name.split("-")[1]) for name in stored_names(str(run)))


def settle(kept: CheckpointKeeper, evaluator: TableEvaluator) -> None:
    """Rounds until nothing is evaluated any more."""
    for _ in range(100):
        kept.round()
        if kept._running is None:
            return
        kept._running[1].exception(10)
    raise AssertionError("evaluations do not end")


def test_without_evaluation_the_newest_stay_and_what_is_being_written_is_left_alone(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        add_checkpoint(tmp_path, step)
    (tmp_path / "step-00000000-unfinished").mkdir()
    keeper(tmp_path, None).round()
    assert steps(tmp_path) == [0, 2, 3]


def test_a_checkpoint_stays_until_it_is_evaluated_and_the_best_one_for_good(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluator = TableEvaluator(tmp_path, {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.5, 5: 0.5})
    kept = keeper(tmp_path, evaluator)
    evaluator.ready.clear()
    for step in (1, 2, 3, 4):
        add_checkpoint(tmp_path, step)
        kept.round()
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert "3 checkpoints wait for it" in capsys.readouterr().out
    evaluator.ready.set()
    settle(kept, evaluator)
    assert evaluator.asked == [1, 2, 3, 4]  # the oldest first, each once
    assert steps(tmp_path) == [2, 3, 4]
    best = read_best(str(tmp_path))
    assert best and (best.step, best.value, best.model) == (2, 1.0, None)
    assert [each.loss for each in read_scores(str(tmp_path))] == [3.0, 1.0, 2.0, 2.5]  # those of removed ones too
    said = capsys.readouterr().out
    assert "evaluated step 2: loss 1.0000 | 8 rows in 1 s | the best so far" in said
    assert "evaluated step 3: loss 2.0000 | 8 rows in 1 s\n" in said
    add_checkpoint(tmp_path, 5)
    settle(kept, evaluator)
    assert steps(tmp_path) == [4, 5]


def test_what_was_evaluated_is_not_again_and_what_was_not_is(tmp_path: Path) -> None:
    first = TableEvaluator(tmp_path, {1: 3.0, 2: 1.0})
    for step in (1, 2):
        add_checkpoint(tmp_path, step)
    settle(keeper(tmp_path, first), first)
    log = (tmp_path / LOG_NAME).read_text()
    add_checkpoint(tmp_path, 3)  # the driver was killed here
    second = TableEvaluator(tmp_path, {3: 2.0})
    settle(keeper(tmp_path, second), second)
    assert second.asked == [3]
    assert (tmp_path / LOG_NAME).read_text().startswith(log)
    assert [each.step for each in read_scores(str(tmp_path))] == [1, 2, 3]

    # A score that was found, and of which nobody has heard, because the driver was killed.
    (tmp_path / LOG_NAME).write_text(log)
    third = TableEvaluator(tmp_path, {})
    settle(keeper(tmp_path, third), third)
    assert third.asked == [] and [each.step for each in read_scores(str(tmp_path))] == [1, 2, 3]


@pytest.mark.parametrize("change", ["measure", "manifest", "damaged"])
def test_a_score_of_something_else_does_not_count(tmp_path: Path, change: str) -> None:
    name = add_checkpoint(tmp_path, 1)
    manifest = read_manifest(f"{tmp_path}/{name}")
    assert isinstance(manifest, CheckpointManifest)
    other = score(1, 9.0, EXACT if change == "measure" else LOSS, manifest.fingerprint(), 0.5)
    if change == "manifest":
        other = other.model_copy(update={"manifest": "of another checkpoint"})
    write_score(str(tmp_path), other)
    if change == "damaged":
        (tmp_path / name / "evaluation.json").write_text("{")
    evaluator = TableEvaluator(tmp_path, {1: 3.0})
    settle(keeper(tmp_path, evaluator), evaluator)
    assert evaluator.asked == [1]
    found = read_score(str(tmp_path), name)
    assert found and found.loss == 3.0


def test_a_failure_costs_the_score_and_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluator = TableEvaluator(tmp_path, {2: 1.0, 3: 2.0, 4: 3.0})
    for step in (1, 2, 3, 4):
        add_checkpoint(tmp_path, step)
    settle(keeper(tmp_path, evaluator), evaluator)
    assert evaluator.asked == [1, 2, 3, 4] and steps(tmp_path) == [2, 3, 4]
    assert "warning: checkpoint step-00000001-00000001 is not evaluated: no luck" in capsys.readouterr().out


@pytest.mark.parametrize(("last", "model", "exported"), [(0.1, "export", []), (9.0, "best", [4])])
def test_the_last_is_evaluated_in_any_case_and_the_best_exported_where_it_is_another(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], last: float, model: str, exported: list[int]
) -> None:
    evaluator = TableEvaluator(tmp_path, {2: 2.0, 4: 1.0, 5: last})
    kept = keeper(tmp_path, evaluator, every=2)
    for step in (1, 2, 3, 4, 5):
        add_checkpoint(tmp_path, step)
    add_export(tmp_path, 5)
    with kept:
        assert kept.finish(interrupted=lambda: False)
    assert evaluator.asked == [2, 4, 5] and evaluator.exported == exported
    best = read_best(str(tmp_path))
    assert best and best.model == model and best.step == (4 if exported else 5)
    assert steps(tmp_path) == [4, 5]
    assert f"the best checkpoint is that of step {best.step}; its model is in {model}/" in capsys.readouterr().out
    again = TableEvaluator(tmp_path, {})
    with keeper(tmp_path, again, every=2) as kept:
        assert kept.finish(interrupted=lambda: False)
    assert again.asked == [] and again.exported == [] and read_best(str(tmp_path)) == best


def test_an_export_of_a_best_checkpoint_that_is_the_last_by_now_is_removed(tmp_path: Path) -> None:
    evaluator = TableEvaluator(tmp_path, {5: 1.0})
    add_checkpoint(tmp_path, 5)
    add_export(tmp_path, 5)
    add_export(tmp_path, 3, "best")
    with keeper(tmp_path, evaluator) as kept:
        assert kept.finish(interrupted=lambda: False)
    assert not (tmp_path / "best").exists()


def test_who_is_interrupted_leaves_the_rest_to_the_next_time(tmp_path: Path) -> None:
    evaluator = TableEvaluator(tmp_path, {1: 1.0})
    evaluator.ready.clear()
    add_checkpoint(tmp_path, 1)
    with keeper(tmp_path, evaluator) as kept:
        assert not kept.finish(interrupted=lambda: True)
    assert not (tmp_path / "best.json").exists() or read_best(str(tmp_path))


def test_the_thread_hears_of_new_checkpoints(tmp_path: Path) -> None:
    saves = [0]

    def next_save(count: int) -> int:
        time.sleep(0.01)
        return saves[0]

    evaluator = TableEvaluator(tmp_path, {step: float(step) for step in range(1, 6)})
    with CheckpointKeeper(str(tmp_path), 2, next_save, evaluator, LOSS):
        for step in range(1, 6):
            add_checkpoint(tmp_path, step)
            saves[0] += 1
        deadline = time.monotonic() + 20
        while steps(tmp_path) != [1, 4, 5]:
            assert time.monotonic() < deadline, steps(tmp_path)
            time.sleep(0.01)
    assert evaluator.asked == [1, 2, 3, 4, 5]


@pytest.mark.s3
def test_it_looks_after_checkpoints_on_s3(tmp_path: Path, s3_uri: str) -> None:
    run = f"{s3_uri}/run"
    for step in (1, 2, 3, 4):
        name = add_checkpoint(tmp_path, step)
        storage.write_bytes(f"{run}/{name}/rank-00000-of-00001.safetensors", b"weights")
        storage.write_bytes(f"{run}/{name}/checkpoint.json", (tmp_path / name / "checkpoint.json").read_bytes())
    manifest = read_manifest(f"{run}/{stored_names(run)[-1]}")
    assert isinstance(manifest, CheckpointManifest)
    write_score(run, score(1, 1.0, manifest=manifest.fingerprint()))
    evaluator = TableEvaluator(tmp_path, {})
    for _ in range(2):  # the second time there is nothing left to do
        kept = CheckpointKeeper(run, 2, lambda count: count, evaluator, LOSS, every=4)
        kept.round(begin=False)
        assert [name[:13] for name in stored_names(run)] == ["step-00000004", "step-00000003", "step-00000001"]
    assert [each.step for each in read_scores(run)] == [1]
    best = read_best(run)
    assert best and best.step == 1
    assert len(storage.list_names(f"{run}/tensorboard/evaluation")) == 1


def test_the_best_is_the_first_of_the_best_and_never_one_that_is_no_number() -> None:
    by_loss = [score(1, float("nan")), score(4, 1.0), score(2, 1.0), score(3, float("inf"))]
    assert best_of(by_loss) == by_loss[2]
    assert best_of(by_loss[:1]) is None
    by_match = [score(step, 1.0, EXACT, exact=share) for step, share in ((1, 0.2), (2, 0.7), (3, 0.7))]
    assert best_of(by_match) == by_match[1]
    assert "exact match 70.0% of 10 questions" in readable(by_match[1], is_best=False)


def test_a_score_that_is_no_number_is_kept_and_logged_once(tmp_path: Path) -> None:
    evaluator = TableEvaluator(tmp_path, {1: float("nan")})
    add_checkpoint(tmp_path, 1)
    kept = keeper(tmp_path, evaluator)
    settle(kept, evaluator)
    kept.round()
    assert evaluator.asked == [1] and not (tmp_path / "best.json").exists()
    (line,) = (tmp_path / LOG_NAME).read_text().splitlines()
    assert json.loads(line)["loss"] != json.loads(line)["loss"]


def test_scores_are_curves_in_a_folder_of_their_own(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    evaluator = TableEvaluator(tmp_path, {1: 3.0, 2: 1.0})
    for step in (1, 2):
        add_checkpoint(tmp_path, step)
        settle(keeper(tmp_path, evaluator), evaluator)
    files = sorted((tmp_path / "tensorboard/evaluation").iterdir())
    drawn = []
    for file in files:
        events = EventAccumulator(str(file))
        events.Reload()
        drawn += [(event.step, event.value) for event in events.Scalars("evaluation/loss")]
    assert sorted(drawn) == [(1, 3.0), (2, 1.0)]
