"""What a run says about itself: a line a person reads, a JSONL line and TensorBoard scalars, every few steps.

`metrics.jsonl` has two kinds of lines: the figures of a window of steps, and `{"step", "time", "checkpoint",
"evaluation": {...}}`, the score of the checkpoint of that step, which comes when its evaluation is done.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pipelines import storage
from pipelines.storage.scratch import new_scratch, remove_scratch
from pipelines.training.errands import Errands
from pipelines.training.scores import NewScores, read_scores
from pipelines.training.tracking import Tracker

METRICS_NAME = "metrics.jsonl"


class RunLog:
    """Writes a run's figures into its folder, local or on an object store. For rank 0 alone.

    On an object store the files are gathered on the local disk and copied by `flush`, at checkpoints and at the end, in
    a thread. Use as a context manager: at its end all is where it belongs.

    Args:
        run_uri: The run's folder.
        num_steps: Of the whole run.
        start_step: The step that this attempt goes on from.
        trackers: Given a local folder for their own files, whoever else shall be told.
        evaluated: Whether checkpoints are evaluated; then their scores are logged as they come.
    """

    def __init__(
        self,
        run_uri: str,
        num_steps: int,
        start_step: int,
        trackers: Callable[[Path], Sequence[Tracker]] = lambda folder: (),
        evaluated: bool = False,
    ) -> None:
        # TensorBoard takes seconds to import, which other ranks need not spend.
        from torch.utils.tensorboard import SummaryWriter

        self._uri = run_uri
        self._local = storage.is_local(run_uri)
        self._folder = Path(run_uri) if self._local else new_scratch("log")
        self._folder.mkdir(parents=True, exist_ok=True)
        self._num_steps = num_steps
        self._step = start_step
        self._lines = self._folder / METRICS_NAME
        before = [line for line in _read_lines(run_uri) if line["step"] <= start_step]
        # What a killed attempt logged after its last checkpoint is done again.
        self._lines.write_text("".join(json.dumps(line) + "\n" for line in before))
        known = [line["checkpoint"] for line in before if "evaluation" in line]
        self._scores = NewScores(run_uri, known) if evaluated else None
        self._board = SummaryWriter(str(self._folder / "tensorboard"), purge_step=start_step + 1)
        self._trackers = trackers(self._folder)
        self._copying = Errands(f"copying the log to {run_uri}")
        self._copied: dict[Path, tuple[int, int]] = {}

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self.close(finished=kind is None)

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Log the figures of the window that ends with `step`."""
        self._step = step
        named = {f"train/{name}": float(value) for name, value in figures.items()}
        for name, value in named.items():
            self._board.add_scalar(name, value, step)
        self._append(step, figures, named)
        print(readable(step, self._num_steps, figures), flush=True)
        if self._scores:
            self._add_scores(self._scores)
            self._scores.look()

    def flush(self) -> None:
        """Make everything written so far visible in the run's folder, soon."""
        self._board.flush()
        if not self._local and not self._copying.waiting:
            self._copying.add(self._copy)

    def close(self, finished: bool = True) -> None:
        """Flush and close.

        Args:
            finished: Whether the run has done its last step; trackers show it.
        """
        if self._scores:
            self._scores.close()
            self._add_scores(self._scores)
        self._board.close()
        for tracker in self._trackers:
            tracker.close(finished)
        self.flush()
        self._copying.close()
        if not self._local:
            remove_scratch(self._folder)

    def _add_scores(self, scores: NewScores) -> None:
        # TensorBoard has them from whoever found them, who needs no running training for that.
        for score in scores.take(self._step):
            named = {f"evaluation/{name}": value for name, value in score.figures.items()}
            self._append(score.step, {"checkpoint": score.checkpoint, "evaluation": score.figures}, named)

    def _append(self, step: int, facts: dict[str, Any], named: dict[str, float]) -> None:
        with self._lines.open("a") as file:
            file.write(json.dumps({"step": step, "time": time.time(), **facts}) + "\n")
        for tracker in self._trackers:
            tracker.write(step, named)

    def _copy(self) -> None:
        for path in sorted(self._folder.rglob("*")):
            if path.is_symlink() or not path.is_file():
                continue
            facts = path.stat()
            version = (facts.st_size, facts.st_mtime_ns)
            if self._copied.get(path) != version:
                name = path.relative_to(self._folder).as_posix()
                storage.write_bytes(storage.join(self._uri, name), path.read_bytes())
                self._copied[path] = version


def readable(step: int, num_steps: int, figures: dict[str, Any]) -> str:
    """One line for a person: where the run is, what it learns, how fast, and when it will be done."""
    parts = [
        f"step {step}/{num_steps}",
        f"epoch {figures['epoch']:.2f}",
        f"loss {figures['loss']:.4f}",
        f"lr {figures['lr']:.2e}{_other_rates(figures)}",
        f"grad {figures['grad_norm']:.2f}" if "grad_norm" in figures else "",
        f"{figures['samples_per_s']:.1f} samples/s",
        f"{figures['tokens_per_s']:.0f} tokens/s",
        f"MFU {figures['mfu']:.1%} (vision {figures['mfu_vision']:.1%})" if "mfu" in figures else "",
        f"data wait {figures['data_wait_share']:.1%}",
        f"padding {figures['padding_share']:.1%}" if "padding_share" in figures else "",
        f"checkpoint {figures['checkpoint_s']:.1f} s" if figures.get("checkpoint_s") else "",
        f"{figures['memory_gib']:.1f} GiB",
        f"{_clock(figures['seconds_left'])} left",
    ]
    return " | ".join(part for part in parts if part)


def read_metrics(run_uri: str) -> list[dict[str, Any]]:
    """The figures of a run's steps, one dict per logged step, in order; an empty list where nothing was logged."""
    return [line for line in _read_lines(run_uri) if "evaluation" not in line]


def log_late_scores(run_uri: str, trackers: Callable[[Path], Sequence[Tracker]]) -> None:
    """Log the scores that came when no worker was left to do it: the last checkpoint's, for one."""
    lines, scores = _read_lines(run_uri), read_scores(run_uri)
    logged = {line["checkpoint"] for line in lines if "evaluation" in line}
    if any(score.checkpoint not in logged for score in scores):
        last = max([line["step"] for line in lines] + [score.step for score in scores])
        RunLog(run_uri, last, last, trackers, evaluated=True).close()


def _read_lines(run_uri: str) -> list[dict[str, Any]]:
    try:
        text = storage.read_bytes(storage.join(run_uri, METRICS_NAME)).decode()
    except FileNotFoundError:
        return []
    # The last line of a killed process may be cut.
    return [json.loads(line) for line in text.split("\n")[:-1] if line]


def _other_rates(figures: dict[str, Any]) -> str:
    rates = [f"{name[3:]} {value:.2e}" for name, value in figures.items() if name.startswith("lr_")]
    return f" ({', '.join(rates)})" if rates else ""


def _clock(seconds: float) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"
