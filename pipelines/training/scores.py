"""What the evaluation of a checkpoint found, where that is kept, and which checkpoint is the best one.

`evaluation.json` lies in the folder of the checkpoint that it is about, and goes with it. A run's folder keeps
`evaluations.jsonl`, a line for every evaluation that there ever was; curves for TensorBoard in
`tensorboard/evaluation`; and `best.json`, which names the best checkpoint. From `evaluations.jsonl` the run's log takes
them into `metrics.jsonl`, and tells its trackers.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable

from pydantic import BaseModel, ConfigDict, ValidationError

from pipelines import storage
from pipelines.storage.scratch import scratch
from pipelines.training.errands import Errands
from pipelines.training.settings import EvaluationSettings, Metric

SCORE_NAME = "evaluation.json"
LOG_NAME = "evaluations.jsonl"
BEST_NAME = "best.json"
BOARD_FOLDER = "tensorboard/evaluation"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_inf_nan="constants")


class Measure(_Strict):
    """What is evaluated, and how. Scores compare only where it is the same."""

    data: list[str]
    """Identity of each manifest of the split."""
    max_rows: int
    metric: Metric
    max_new_tokens: int

    @classmethod
    def of(cls, settings: EvaluationSettings, identities: list[str]) -> Measure:
        """What a run with these settings measures on manifests of these identities."""
        return cls(
            data=identities,
            max_rows=settings.max_rows,
            metric=settings.metric,
            max_new_tokens=settings.max_new_tokens,
        )


class Score(_Strict):
    """`evaluation.json`."""

    checkpoint: str
    """Name of the checkpoint's folder."""
    manifest: str
    """Fingerprint of its manifest."""
    step: int
    measure: Measure
    rows: int
    loss_tokens: int
    loss: float
    """Mean over the loss tokens of the split."""
    questions: int | None = None
    exact_match: float | None = None
    """Share of the questions that were answered exactly right, 0 to 1; where that is the metric."""
    seconds: float

    @property
    def value(self) -> float:
        """The metric."""
        return self.loss if self.exact_match is None else self.exact_match

    @property
    def figures(self) -> dict[str, float]:
        """What is drawn as curves."""
        return {"loss": self.loss} | ({} if self.exact_match is None else {"exact_match": self.exact_match})


class Best(_Strict):
    """`best.json`."""

    checkpoint: str
    step: int
    metric: Metric
    value: float
    model: str | None = None
    """The folder, in the run's, of its export; none before the run has ended."""


def read_score(run_uri: str, checkpoint: str) -> Score | None:
    """The score that lies in a checkpoint's folder; None where there is none, or another version wrote it."""
    try:
        return Score.model_validate_json(storage.read_bytes(storage.join(run_uri, checkpoint, SCORE_NAME)))
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def write_score(run_uri: str, score: Score) -> None:
    """Put a score beside the files of its checkpoint."""
    data = score.model_dump_json(indent=1).encode()
    storage.write_bytes(storage.join(run_uri, score.checkpoint, SCORE_NAME), data)


def read_scores(run_uri: str) -> list[Score]:
    """All scores that a run ever had, in the order in which they were found."""
    try:
        text = storage.read_bytes(storage.join(run_uri, LOG_NAME)).decode()
    except FileNotFoundError:
        return []
    return [Score.model_validate_json(line) for line in text.splitlines()]


def read_best(run_uri: str) -> Best | None:
    """The best checkpoint as the run has named it; None before it has."""
    try:
        return Best.model_validate_json(storage.read_bytes(storage.join(run_uri, BEST_NAME)))
    except FileNotFoundError:
        return None


def best_of(scores: Iterable[Score]) -> Score | None:
    """The best one of scores of one measure, and of equally good ones the first; one that is no number never is."""
    known = [score for score in scores if math.isfinite(score.value)]
    return min(known, key=_order, default=None)


def _order(score: Score) -> tuple[float, int]:
    return (score.value if score.measure.metric == "loss" else -score.value), score.step


class ScoreLog:
    """Keeps the scores of a run where they outlive their checkpoints, and tells them to the person who watches."""

    def __init__(self, run_uri: str) -> None:
        self._uri = run_uri
        self._scores = read_scores(run_uri)

    def add(self, score: Score, is_best: bool) -> None:
        """Log a score, unless it is known."""
        if any(each.checkpoint == score.checkpoint and each.measure == score.measure for each in self._scores):
            return
        self._scores.append(score)
        text = "".join(each.model_dump_json() + "\n" for each in self._scores)
        storage.write_bytes(storage.join(self._uri, LOG_NAME), text.encode())
        self._draw(score)
        print(readable(score, is_best), flush=True)

    def _draw(self, score: Score) -> None:
        # TensorBoard takes seconds to import, which a run without evaluation need not spend.
        from torch.utils.tensorboard import SummaryWriter

        # A file for each score, which is whole when it arrives: an object store cannot append. In a folder of their
        # own: TensorBoard leaves a file for good once there is a younger one beside it, and the training's still grows.
        with scratch("score") as folder:
            with SummaryWriter(str(folder), filename_suffix=f".{score.checkpoint}") as board:
                for name, value in score.figures.items():
                    board.add_scalar(f"evaluation/{name}", value, score.step)
            for path in folder.iterdir():
                storage.write_bytes(storage.join(self._uri, BOARD_FOLDER, path.name), path.read_bytes())


class NewScores:
    """The scores that a run's log has not yet. They are found beside the driver, and looked for here in a thread.

    Args:
        run_uri: The run's folder.
        known: The checkpoints whose scores are logged.
    """

    def __init__(self, run_uri: str, known: Iterable[str]) -> None:
        self._uri = run_uri
        self._known = set(known)
        self._found: deque[Score] = deque()
        self._looking = Errands(f"reading the scores of {run_uri}")

    def look(self) -> None:
        """Look for more, soon."""
        if not self._looking.waiting:
            self._looking.add(self._look)

    def take(self, step: int) -> list[Score]:
        """What has been found since the last time, of checkpoints up to `step`; later ones are left for then."""
        found = [self._found.popleft() for _ in range(len(self._found))]
        self._found.extend(score for score in found if score.step > step)
        return [score for score in found if score.step <= step]

    def close(self) -> None:
        """Look for the last time, and wait for it."""
        self.look()
        self._looking.close()

    def _look(self) -> None:
        for score in read_scores(self._uri):
            if score.checkpoint not in self._known:
                self._known.add(score.checkpoint)
                self._found.append(score)


def readable(score: Score, is_best: bool) -> str:
    """One line for a person."""
    parts = [
        f"evaluated step {score.step}: loss {score.loss:.4f}",
        "" if score.exact_match is None else f"exact match {score.exact_match:.1%} of {score.questions} questions",
        f"{score.rows} rows in {score.seconds:.0f} s",
        "the best so far" if is_best else "",
    ]
    return " | ".join(part for part in parts if part)
