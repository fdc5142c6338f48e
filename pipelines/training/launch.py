"""The driver's side of a training run: check everything that can be checked, then hand over to Ray Train."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pyarrow.fs
import ray
import yaml
from ray.train import ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.config import CheckpointConfig, FailureConfig, LoggingConfig, RunConfig
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from pipelines import storage
from pipelines.settings import dump_settings
from pipelines.shards.manifest import Manifest
from pipelines.training.checkpoint import refuse_changed_run
from pipelines.training.console import show_worker_lines_only
from pipelines.training.loop import export_uri, run_identity, run_uri, train_worker
from pipelines.training.process import require_compiler, worker_environment
from pipelines.training.settings import ScalingSettings, TrainSettings
from pipelines.training.start import check_encoder, check_start, load_processor


class TrainingError(RuntimeError):
    """A run failed on its workers; the message gives the first worker's error."""


class ResourceError(ValueError):
    """The cluster can never give the workers that a run asks for; the message gives both numbers."""


def resolve_settings(settings: TrainSettings) -> TrainSettings:
    """Local paths made absolute: workers run elsewhere."""
    resolved = settings.model_copy(deep=True)
    resolved.data.folders = [storage.resolve(folder) for folder in settings.data.folders]
    resolved.run.storage = storage.resolve(settings.run.storage)
    for name in ("checkpoint", "processor"):
        if value := getattr(settings.model, name):
            setattr(resolved.model, name, storage.resolve(value))
    if backbones := resolved.model.backbones:
        for name in ("language", "vision", "tokenizer"):
            value = getattr(backbones, name)
            if value and os.path.isdir(value):  # otherwise a name on the hub
                setattr(backbones, name, os.path.abspath(value))
    return resolved


def check_inputs(settings: TrainSettings) -> None:
    """Read what the run starts from and its manifests, and compare them with each other and with an earlier attempt.

    Raises:
        ManifestError, ExportError, StartError, CheckpointError: What does not fit, by name.
    """
    manifests = {folder: Manifest.load(folder) for folder in settings.data.folders}
    check_start(settings, manifests, load_processor(settings.model))
    check_encoder(settings.model, manifests)
    refuse_changed_run(run_uri(settings.run), run_identity(settings, list(manifests.values())))


def check_cluster(scaling: ScalingSettings) -> None:
    """Make sure that the connected cluster can place the workers, now or once it has grown.

    Raises:
        ResourceError: It never can. Ray itself would wait for ever (ray#60376).
        CompilerError: Workers without a GPU could not build what they need.
    """
    wanted = {"CPU": scaling.cpus_per_worker, "GPU": scaling.gpus_per_worker}
    total = _largest_cluster()
    for name, per_worker in wanted.items():
        if scaling.num_workers * per_worker > total.get(name, 0):
            raise ResourceError(
                f"the run asks for {scaling.num_workers} workers with {per_worker} {name} each, "
                f"{scaling.num_workers * per_worker} in all; the cluster has at most {total.get(name, 0):g} {name}: "
                "lower scaling.num_workers or what each asks for, or use a larger cluster"
            )
    if scaling.gpus_per_worker == 0:
        ray.get(ray.remote(num_cpus=1)(require_compiler).remote())


def train(settings: TrainSettings, worker: Callable[[dict[str, Any]], None] = train_worker) -> str:
    """Run or continue the training; returns where the exported model is.

    Args:
        settings: With absolute paths, see `resolve_settings`.
        worker: What each worker runs on `settings` as a dict.

    Raises:
        TrainingError: A worker failed more often than `run.max_failures` allows.
    """
    show_worker_lines_only()
    storage.write_bytes(storage.join(run_uri(settings.run), "config.yaml"), dump_settings(settings).encode())
    try:
        _trainer(settings, worker).fit()
    except WorkerGroupError as error:
        rank, failure = min(error.worker_failures.items())
        raise TrainingError(f"worker {rank} failed: {failure}") from error
    except TrainingFailedError as error:
        raise TrainingError(str(error)) from error
    return export_uri(settings.run)


def _trainer(settings: TrainSettings, worker: Callable[[dict[str, Any]], None]) -> TorchTrainer:
    run, scaling = settings.run, settings.scaling
    filesystem, path = _ray_storage(run.storage)
    environment = worker_environment(scaling.cpus_per_worker, scaling.gpus_per_worker > 0)
    return TorchTrainer(
        worker,
        train_loop_config=yaml.safe_load(dump_settings(settings)),
        scaling_config=ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=scaling.gpus_per_worker > 0,
            resources_per_worker={"CPU": scaling.cpus_per_worker}
            | ({"GPU": scaling.gpus_per_worker} if scaling.gpus_per_worker else {}),
            placement_strategy=scaling.placement,
        ),
        run_config=RunConfig(  # type: ignore[arg-type]  # ray.train is typed as its first version
            name=run.name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=run.max_failures),
            checkpoint_config=CheckpointConfig(num_to_keep=run.keep),
            worker_runtime_env={"env_vars": environment},
            logging_config=LoggingConfig(log_level="WARNING"),
        ),
    )


def _ray_storage(uri: str) -> tuple[pyarrow.fs.FileSystem | None, str]:
    """A storage place as Ray Train takes it."""
    if not uri.startswith(("s3://", "s3a://")):
        return None, uri
    # The endpoint is given here because Ray would parse the URI without it; keys come from the environment or the role.
    filesystem = pyarrow.fs.S3FileSystem(
        endpoint_override=os.environ.get("AWS_ENDPOINT_URL"),
        region=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION"),
    )
    return filesystem, uri.split("://", 1)[1]


def _largest_cluster() -> dict[str, float]:
    """Resources of the cluster as it is, or as its autoscaler may make it."""
    now = ray.cluster_resources()
    limits = ray._private.state.state.get_max_resources_from_cluster_config() or {}
    return {name: max(now.get(name, 0), limits.get(name, 0)) for name in ("CPU", "GPU")}
