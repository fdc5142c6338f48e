"""Settings of the trackers that follow a run."""

from __future__ import annotations

from typing import Literal
from urllib.parse import urlsplit

from pydantic import field_validator

from pipelines.settings import Section


class WandbSettings(Section):
    """A Weights & Biases run; its key comes from the workers' environment (`WANDB_API_KEY`) or `wandb login`."""

    project: str = "flashsloth"
    """Project that holds the run."""
    entity: str | None = None
    """User or team; by default the key's."""
    mode: Literal["online", "offline"] = "online"
    """offline: gathered in the run's folder under wandb/, to be sent later with `wandb sync`."""


class MlflowSettings(Section):
    """An MLflow run; user and password come from the environment (`MLFLOW_TRACKING_USERNAME`, `..._PASSWORD`)."""

    uri: str
    """Tracking server or store, reached from the workers."""
    experiment: str = "flashsloth"
    """Experiment that holds the run; it is created where there is none."""

    @field_validator("uri")
    @classmethod
    def _without_password(cls, uri: str) -> str:
        if urlsplit(uri).username is not None:
            raise ValueError(
                "settings are written to the run's folder, so they take no password: leave it out of the URI, and set "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return uri


class TrackingSettings(Section):
    """Who else is told a run's figures, beside metrics.jsonl and TensorBoard. Needs `pip install '.[tracking]'`."""

    wandb: WandbSettings | None = None
    """Weights & Biases."""
    mlflow: MlflowSettings | None = None
    """MLflow."""
