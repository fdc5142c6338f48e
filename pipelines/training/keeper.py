"""Which checkpoints of a run stay, and which are evaluated: decided beside the driver, by what is in the run's folder.

A checkpoint stays while it is one of the newest `run.keep`, waits for its evaluation, or is the best one. What has been
evaluated is read from the checkpoints themselves: whoever dies, and however often the run is continued, each is
evaluated once. An evaluation that fails for good costs its score, and never the training.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Protocol

from pipelines import storage
from pipelines.training.checkpoint import CheckpointManifest, read_manifest, remove, stored_names
from pipelines.training.export import read_export_step
from pipelines.training.scores import BEST_NAME, Best, Measure, Score, ScoreLog, best_of, read_best, read_score

EXPORT_NAME = "export"
"""The folder, in the run's, of the model after the last step."""
BEST_EXPORT_NAME = "best"
"""That of the best checkpoint's model, where the best is not the last."""
_LOOK_S = 0.5


class EvaluationFailed(RuntimeError):
    """A checkpoint has no score, and will have none for now; the message says why."""


class Evaluator(Protocol):
    """What evaluates, wherever it runs. `evaluate` and `export` block, and raise `EvaluationFailed`."""

    def evaluate(self, checkpoint: str) -> Score:
        """Evaluate a checkpoint and put the score into its folder."""

    def export(self, checkpoint: str, target: str) -> None:
        """Write its model as a `from_pretrained` folder."""

    def close(self) -> None:
        """End whatever runs; an `evaluate` that another thread waits for raises."""


@dataclass
class _Stored:
    """A complete checkpoint."""

    name: str
    step: int
    score: Score | None
    """Of the measure that counts now."""


class CheckpointKeeper:
    """Looks after the checkpoints of one run; use as a context manager around the training.

    Args:
        run_uri: The run's folder.
        keep: How many of the newest stay in any case.
        next_save: Waits a moment for a checkpoint after the so-manyeth; returns how many there have been.
        evaluator: Without it there are no evaluations.
        measure: What it measures.
        every: Steps between two evaluations; None for each checkpoint. The last one is evaluated in any case.
    """

    def __init__(
        self,
        run_uri: str,
        keep: int,
        next_save: Callable[[int], int],
        evaluator: Evaluator | None = None,
        measure: Measure | None = None,
        every: int | None = None,
    ) -> None:
        self._uri = run_uri
        self._keep = keep
        self._next_save = next_save
        self._evaluator = evaluator
        self._measure = measure
        self._every = every
        self._log = ScoreLog(run_uri)
        self._manifests: dict[str, CheckpointManifest] = {}
        self._hopeless: set[str] = set()
        """Checkpoints whose evaluation has failed for good."""
        self._running: tuple[str, Future[Score]] | None = None
        self._most_waiting = keep
        self._named = read_best(run_uri)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="evaluation")
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="checkpoints", daemon=True)

    def __enter__(self) -> CheckpointKeeper:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._join()
        if self._evaluator:
            self._evaluator.close()
        self._worker.shutdown(wait=True, cancel_futures=True)
        self._try_round(begin=False)

    def finish(self, interrupted: Callable[[], bool]) -> bool:
        """After the last step: wait for the evaluations, the last checkpoint's among them, and export the best one.

        Args:
            interrupted: Asked now and then whether to leave the rest to the next time; then this returns False.
        """
        self._join()
        self.round(ended=True)
        if self._running:
            print("the steps are done; waiting for the last evaluations", flush=True)
        while self._running:
            if wait([self._running[1]], timeout=_LOOK_S).done:
                self.round(ended=True)
            elif interrupted():
                return False
        if self._evaluator:
            self._export_best(self._evaluator)
        return True

    def round(self, ended: bool = False, begin: bool = True) -> None:
        """Look once: take a score, begin the next evaluation, remove what nobody needs.

        Args:
            ended: The newest checkpoint is the last one.
            begin: Whether an evaluation may begin.
        """
        self._take()
        stored = self._look()
        waiting = self._waiting(stored, ended)
        if begin:
            self._begin(waiting)
        best = best_of(each.score for each in stored if each.score)
        for each in reversed(stored):
            if each.score:
                self._log.add(each.score, each.score == best)
        if best and not (self._named and self._named.checkpoint == best.checkpoint):
            self._name_best(best, model=None)
        needed = {each.name for each in (*stored[: self._keep], *waiting)} | ({best.checkpoint} if best else set())
        for each in stored:
            if each.name not in needed:
                remove(self._uri, each.name)

    def _watch(self) -> None:
        saves = 0
        self._try_round()  # what an earlier attempt has left to do
        while not self._done.is_set():
            seen = self._next_save(saves)
            if seen != saves or (self._running and self._running[1].done()):
                saves = seen
                self._try_round()

    def _try_round(self, begin: bool = True) -> None:
        try:
            self.round(begin=begin)
        except (OSError, ValueError) as error:  # the storage; the next round may have more luck
            print(f"warning: cannot look after the checkpoints ({error}); trying again at the next one", flush=True)

    def _join(self) -> None:
        self._done.set()
        if self._thread.is_alive():
            self._thread.join()

    def _look(self) -> list[_Stored]:
        """The complete checkpoints, the newest first."""
        stored = []
        for name in stored_names(self._uri):
            manifest = self._manifests.get(name) or read_manifest(storage.join(self._uri, name))
            if not isinstance(manifest, CheckpointManifest):
                continue  # being written, or what a killed attempt has left
            self._manifests[name] = manifest
            score = read_score(self._uri, name) if self._evaluator else None
            if score and (score.measure != self._measure or score.manifest != manifest.fingerprint()):
                score = None
            stored.append(_Stored(name, manifest.progress.step, score))
        return stored

    def _waiting(self, stored: list[_Stored], ended: bool) -> list[_Stored]:
        """Those that have no score and shall have one, the newest first."""
        if not self._evaluator:
            return []
        return [
            each
            for number, each in enumerate(stored)
            if each.score is None
            and each.name not in self._hopeless
            and (not self._every or each.step % self._every == 0 or (ended and number == 0))
        ]

    def _begin(self, waiting: list[_Stored]) -> None:
        if len(waiting) > self._most_waiting:
            self._most_waiting = 2 * len(waiting)  # said anew when it is twice as bad
            print(
                f"warning: evaluation falls behind: {len(waiting)} checkpoints wait for it, and are kept so long; "
                "raise evaluation.every, or lower evaluation.max_rows",
                flush=True,
            )
        if waiting and self._evaluator and not self._running:
            name = waiting[-1].name  # the oldest
            self._running = name, self._worker.submit(self._evaluator.evaluate, name)

    def _take(self) -> None:
        if not self._running or not self._running[1].done():
            return
        (name, future), self._running = self._running, None
        try:
            future.result()  # lies in the checkpoint's folder, where all scores are read
        except EvaluationFailed as error:
            self._hopeless.add(name)
            print(f"warning: checkpoint {name} is not evaluated: {error}; training is not affected", flush=True)

    def _export_best(self, evaluator: Evaluator) -> None:
        """See that the best checkpoint's model is there: the run's export, or one of its own."""
        best = best_of(each.score for each in self._look() if each.score)
        target = storage.join(self._uri, BEST_EXPORT_NAME)
        if best is None:
            print("warning: no checkpoint has a score, so none is the best", flush=True)
            return
        if best.step == read_export_step(storage.join(self._uri, EXPORT_NAME)):
            remove(self._uri, BEST_EXPORT_NAME)  # of an earlier end of this run
            self._name_best(best, EXPORT_NAME)
            return
        if best.step != read_export_step(target):
            try:
                evaluator.export(best.checkpoint, target)
            except EvaluationFailed as error:
                print(f"warning: the best checkpoint, {best.checkpoint}, is not exported: {error}", flush=True)
                return
        self._name_best(best, BEST_EXPORT_NAME)

    def _name_best(self, best: Score, model: str | None) -> None:
        named = Best(
            checkpoint=best.checkpoint, step=best.step, metric=best.measure.metric, value=best.value, model=model
        )
        if named == self._named:
            return
        if model:
            print(f"the best checkpoint is that of step {best.step}; its model is in {model}/", flush=True)
        self._named = named
        storage.write_bytes(storage.join(self._uri, BEST_NAME), named.model_dump_json(indent=1).encode())
