"""Weights & Biases and MLflow, for runs that ask for them. Each is imported only then.

A run's word, drawn once and kept in its folder, stands for it at every tracker: an attempt that goes on from a
checkpoint goes on with the same W&B run and the same MLflow run. Steps that it does again appear there twice. Trackers
are told by a thread of their own (`pipelines.training.errands`): one that does not answer costs a warning and what it
was not told, and no step.
"""

from __future__ import annotations

import importlib.util
import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pipelines import storage
from pipelines.training.errands import Errands
from pipelines.training.settings import TrainSettings
from pipelines.training.tracking_settings import MlflowSettings, TrackingSettings, WandbSettings

RECORD_NAME = "tracking.json"
WORD_TAG = "flashsloth_run"
"""The MLflow tag that holds a run's word."""
_MODULES = {"wandb": "wandb", "mlflow": "mlflow-skinny"}
_PATIENCE_S = 60.0
_MLFLOW_VALUE = 500  # characters that MLflow's oldest servers take as a parameter
_MLFLOW_PARAMS = 100  # that it takes at once


class TrackingError(ValueError):
    """A run asks for a tracker that cannot be used; the message says what to install or to set."""


class Tracker(ABC):
    """Tells one tracker the figures of a run, in the background. Subclasses say how.

    Args:
        name: For messages.
    """

    def __init__(self, name: str) -> None:
        self._errands = Errands(f"telling {name}")
        self._is_open = False

    @property
    def failed(self) -> int:
        """How often it was not told."""
        return self._errands.failed

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Tell the figures of `step` soon."""
        now = time.time()
        self._errands.add(lambda: self._when_open(lambda: self._write(step, figures, now)))

    def close(self, finished: bool, patience_s: float = _PATIENCE_S) -> None:
        """Tell what is left, and whether the run has done its last step."""
        self._errands.add(lambda: self._when_open(lambda: self._close(finished)))
        self._errands.close(patience_s)

    def _when_open(self, call: Callable[[], None]) -> None:
        # Opened by the thread, and tried again each time: a server may be down when an attempt starts.
        if not self._is_open:
            self._open()
            self._is_open = True
        call()

    @abstractmethod
    def _open(self) -> None:
        """Find or begin the run at the tracker; raises while the tracker does not answer."""

    @abstractmethod
    def _write(self, step: int, figures: Mapping[str, float], now: float) -> None:
        """Tell the figures of `step`, measured at `now` in seconds since 1970."""

    @abstractmethod
    def _close(self, finished: bool) -> None:
        """Say that nothing more comes."""


class WandbTracker(Tracker):
    """Weights & Biases. What it keeps on the disk lies in `folder`/wandb."""

    def __init__(self, settings: TrainSettings, where: WandbSettings, word: str, folder: Path) -> None:
        super().__init__("Weights & Biases")
        self._settings, self._where, self._word, self._folder = settings, where, word, folder
        self._run: Any = None

    def _open(self) -> None:
        import wandb

        self._run = wandb.init(
            project=self._where.project,
            entity=self._where.entity,
            mode=self._where.mode,
            name=self._settings.run.name,
            id=self._word,
            resume="allow",
            dir=self._folder,
            config=self._settings.model_dump(mode="json"),
            settings=wandb.Settings(console="off", silent=True),
        )
        # W&B's own counter cannot go back, where an attempt does steps again and evaluations come late.
        self._run.define_metric("*", step_metric="step")

    def _write(self, step: int, figures: Mapping[str, float], now: float) -> None:
        self._run.log({"step": step, **figures})

    def _close(self, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


class MlflowTracker(Tracker):
    """MLflow, by its client alone: nothing global changes."""

    def __init__(self, settings: TrainSettings, where: MlflowSettings, word: str) -> None:
        super().__init__(f"MLflow at {where.uri}")
        self._settings, self._where, self._word = settings, where, word
        self._client: Any = None
        self._run_id = ""

    def _open(self) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient(tracking_uri=self._where.uri)
        experiment = self._client.get_experiment_by_name(self._where.experiment)
        number = experiment.experiment_id if experiment else self._client.create_experiment(self._where.experiment)
        found = self._client.search_runs([number], f"tags.{WORD_TAG} = '{self._word}'")
        if found:
            self._run_id = found[0].info.run_id
            self._client.update_run(self._run_id, status="RUNNING")
            return
        tags = {WORD_TAG: self._word}
        self._run_id = self._client.create_run(number, tags=tags, run_name=self._settings.run.name).info.run_id
        values = flat(self._settings.model_dump(mode="json"))
        params = [Param(name, value[:_MLFLOW_VALUE]) for name, value in values.items()]
        for start in range(0, len(params), _MLFLOW_PARAMS):
            self._client.log_batch(self._run_id, params=params[start : start + _MLFLOW_PARAMS])

    def _write(self, step: int, figures: Mapping[str, float], now: float) -> None:
        from mlflow.entities import Metric

        self._client.log_batch(
            self._run_id, metrics=[Metric(name, value, int(1000 * now), step) for name, value in figures.items()]
        )

    def _close(self, finished: bool) -> None:
        self._client.set_terminated(self._run_id, "FINISHED" if finished else "KILLED")


def check_tracking(tracking: TrackingSettings) -> None:
    """Make sure, before anything starts, that the trackers that a run asks for can be used.

    Raises:
        TrackingError: A package is not installed, W&B has no key, or MLflow does not know the kind of URI.
    """
    for section, package in _MODULES.items():
        if getattr(tracking, section) and importlib.util.find_spec(section) is None:
            raise TrackingError(
                f"tracking.{section} needs the package {package}, which is not installed here: "
                "pip install '.[tracking]', on all machines that run workers"
            )
    if tracking.wandb and tracking.wandb.mode == "online":
        _require_wandb_key()
    if tracking.mlflow:
        _require_mlflow_store(tracking.mlflow.uri)


def open_trackers(settings: TrainSettings, run_uri: str, folder: Path) -> list[Tracker]:
    """The trackers of a run.

    Args:
        settings: Of the run; trackers show them.
        run_uri: The run's folder, which holds its word.
        folder: A local folder for the trackers' own files.
    """
    tracking = settings.tracking
    trackers: list[Tracker] = []
    if tracking.wandb or tracking.mlflow:
        word = run_word(run_uri)
        if tracking.wandb:
            trackers.append(WandbTracker(settings, tracking.wandb, word, folder))
        if tracking.mlflow:
            trackers.append(MlflowTracker(settings, tracking.mlflow, word))
    return trackers


def run_word(run_uri: str) -> str:
    """The word that stands for a run at its trackers; drawn when it is first asked for."""
    uri = storage.join(run_uri, RECORD_NAME)
    if not storage.exists(uri):
        storage.write_bytes(uri, json.dumps({"id": uuid.uuid4().hex[:12]}).encode())
    return json.loads(storage.read_bytes(uri))["id"]


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names and text."""
    found: dict[str, str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = str(value)
    return found


def _require_wandb_key() -> None:
    import wandb

    if not wandb.login(prompt=False, verify=False):
        raise TrackingError(
            "tracking.wandb has no key here: set WANDB_API_KEY for all machines that run workers, or run `wandb login` "
            "on them, or set tracking.wandb.mode to offline"
        )


def _require_mlflow_store(uri: str) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        MlflowClient(tracking_uri=uri)  # connects to nothing yet
    except MlflowException as error:
        raise TrackingError(f"tracking.mlflow.uri {uri}: {error.message}") from error
