"""The evaluator of a run as a Ray actor with resources of its own, started again when it dies."""

from __future__ import annotations

import threading
from typing import Any

import ray
import torch
import transformers
import yaml
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from pipelines.settings import dump_settings
from pipelines.storage.faults import StorageError
from pipelines.training.evaluator import CheckpointEvaluator
from pipelines.training.keeper import EvaluationFailed
from pipelines.training.process import worker_environment
from pipelines.training.scores import Score
from pipelines.training.settings import TrainSettings

_TRIES = 3


class EvaluatorProcess:
    """What the actor is. The model is built by the first call, so that its errors arrive as they are."""

    def __init__(self, settings: dict[str, Any], run_uri: str) -> None:
        self._settings = TrainSettings.model_validate(settings)
        self._run_uri = run_uri
        self._evaluator: CheckpointEvaluator | None = None

    def started(self) -> None:
        """Nothing; that it returns says that the cluster has room."""

    def evaluate(self, checkpoint: str) -> Score:
        """As `CheckpointEvaluator.evaluate`."""
        return self._built().evaluate(checkpoint)

    def export(self, checkpoint: str, target: str) -> None:
        """As `CheckpointEvaluator.export`."""
        self._built().export(checkpoint, target)

    def _built(self) -> CheckpointEvaluator:
        if self._evaluator is None:
            evaluation = self._settings.evaluation
            assert evaluation
            torch.set_num_threads(evaluation.cpus)
            transformers.utils.logging.disable_progress_bar()
            device = torch.device("cuda" if evaluation.gpus else "cpu")
            self._evaluator = CheckpointEvaluator(self._settings, self._run_uri, device)
        return self._evaluator


class RemoteEvaluator:
    """Evaluates on the connected cluster; an `Evaluator` of `CheckpointKeeper`.

    The actor starts with the first evaluation and holds its place from then on. One that dies or hangs is followed by
    another one, which begins that checkpoint anew; after three, the checkpoint is given up.

    Args:
        settings: Of the run, with absolute paths and an `evaluation` section.
        run_uri: The run's folder.
    """

    def __init__(self, settings: TrainSettings, run_uri: str) -> None:
        assert settings.evaluation, "only a run with an evaluation section has an evaluator"
        self._evaluation = settings.evaluation
        self._arguments = (yaml.safe_load(dump_settings(settings)), run_uri)
        self._actor: Any = None
        self._lock = threading.Lock()
        self._closed = False

    def start(self, timeout_s: float) -> bool:
        """Take a place in the cluster now, before an elastic run takes all there are. Whether there was one in time."""
        try:
            ray.get(self._process().started.remote(), timeout=timeout_s)
        except GetTimeoutError:
            self._drop()
            return False
        return True

    def evaluate(self, checkpoint: str) -> Score:
        """As `Evaluator.evaluate`."""
        return self._call("evaluate", checkpoint)

    def export(self, checkpoint: str, target: str) -> None:
        """As `Evaluator.export`."""
        self._call("export", checkpoint, target)

    def close(self) -> None:
        """As `Evaluator.close`."""
        with self._lock:
            self._closed = True
        self._drop()

    def _call(self, method: str, *arguments: str) -> Any:
        timeout_s = self._evaluation.timeout_s
        problem = ""
        for attempt in range(1, _TRIES + 1):
            if self._closed:
                break
            if problem:
                print(f"the evaluator {problem}; starting another one, attempt {attempt} of {_TRIES}", flush=True)
            try:
                return ray.get(getattr(self._process(), method).remote(*arguments), timeout=timeout_s)
            except RayTaskError as error:
                cause = error.cause
                if isinstance(cause, ValueError) and not isinstance(cause, StorageError):
                    # A damaged checkpoint will be no better the next time.
                    raise EvaluationFailed(str(cause)) from error
                problem = f"failed on {' '.join(arguments)} ({type(cause).__name__}: {cause})"
            except GetTimeoutError:
                problem = (
                    f"has not been done with {' '.join(arguments)} after {timeout_s:g} s (evaluation.timeout_s), "
                    "or the cluster had no room for it"
                )
            except RayError as error:
                problem = f"died over {' '.join(arguments)} ({str(error).strip().partition(chr(10))[0]})"
            self._drop()
        raise EvaluationFailed("the run has ended before" if self._closed else f"the evaluator {problem}")

    def _process(self) -> Any:
        with self._lock:
            if self._actor is None and not self._closed:
                self._actor = self._start()
            if self._actor is None:
                raise EvaluationFailed("the run has ended before")
            return self._actor

    def _start(self) -> Any:
        options = {"num_cpus": self._evaluation.cpus, "num_gpus": self._evaluation.gpus, "max_restarts": 0}
        environment = worker_environment(self._evaluation.cpus, self._evaluation.gpus > 0)
        start: Any = ray.remote(EvaluatorProcess)
        start = start.options(**options, runtime_env={"env_vars": environment})
        return start.remote(*self._arguments)

    def _drop(self) -> None:
        actor, self._actor = self._actor, None
        if actor is not None:
            ray.kill(actor)
