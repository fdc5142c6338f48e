"""The driver's side of a training run: check everything that can be checked, then hand over to Ray Train."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NoReturn

import pyarrow.fs
import ray
import yaml
from ray.train import ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.config import FailureConfig, LoggingConfig, RunConfig
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from pipelines import storage
from pipelines.ray_session import largest_cluster
from pipelines.settings import dump_settings
from pipelines.shards.manifest import Manifest
from pipelines.training.checkpoint import refuse_changed_run
from pipelines.training.compiler import require_compiler
from pipelines.training.console import show_worker_lines_only
from pipelines.training.evaluator import check_split
from pipelines.training.keeper import CheckpointKeeper
from pipelines.training.lookout import Lookout, drop_record
from pipelines.training.loop import export_uri, run_identity, run_uri, train_worker
from pipelines.training.lost_ranks import TellLostRanks
from pipelines.training.process import worker_environment
from pipelines.training.recording import recorded
from pipelines.training.remote_evaluator import RemoteEvaluator
from pipelines.training.run_log import log_late_scores
from pipelines.training.scores import Measure
from pipelines.training.settings import EvaluationSettings, ScalingSettings, TrainSettings
from pipelines.training.start import check_encoder, check_start, load_processor, start_identity
from pipelines.training.supervisor import start_supervisor
from pipelines.training.tracking import check_tracking, open_trackers


class TrainingError(RuntimeError):
    """A run failed on its workers; the message gives the first worker's error."""


class TrainingStopped(RuntimeError):
    """A run was stopped and can go on later; the message says at which step."""


class ResourceError(ValueError):
    """The cluster does not give the workers that a run asks for; the message gives both numbers."""


def resolve_settings(settings: TrainSettings) -> TrainSettings:
    """Local paths made absolute: workers run elsewhere."""
    resolved = settings.model_copy(deep=True)
    resolved.data.folders = [storage.resolve(folder) for folder in settings.data.folders]
    if resolved.evaluation:
        resolved.evaluation.folders = [storage.resolve(folder) for folder in resolved.evaluation.folders]
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
        ManifestError, ExportError, StartError, CheckpointError, TrackingError: What does not fit, by name.
    """
    check_tracking(settings.tracking)
    manifests = {folder: Manifest.load(folder) for folder in settings.data.folders}
    check_start(settings, manifests, load_processor(settings.model))
    check_encoder(settings.model, manifests)
    check_split(settings)
    identity = run_identity(settings, list(manifests.values()), start_identity(settings.model))
    refuse_changed_run(run_uri(settings.run), identity)


def check_cluster(scaling: ScalingSettings, evaluation: EvaluationSettings | None = None) -> None:
    """Make sure that the connected cluster can place the workers and an evaluator, now or once it has grown.

    Raises:
        ResourceError: It never can. Ray itself would wait for ever (ray#60376).
        CompilerError: Workers without a GPU could not build what they need.
    """
    wanted = {"CPU": scaling.cpus_per_worker, "GPU": scaling.gpus_per_worker}
    reserved = {"CPU": evaluation.cpus, "GPU": evaluation.gpus} if evaluation else {}
    total = largest_cluster()
    fewest = scaling.bounds[0]
    for name, per_worker in wanted.items():
        beside = reserved.get(name, 0)
        if fewest * per_worker + beside > total.get(name, 0):
            raise ResourceError(
                f"the run asks for {fewest} workers with {per_worker} {name} each"
                f"{f' and {beside} for evaluation.{name.lower()}s' if beside else ''}, "
                f"{fewest * per_worker + beside} in all; the cluster has at most {total.get(name, 0):g} {name}: "
                "lower scaling.num_workers or what each asks for, or use a larger cluster"
            )
    if scaling.gpus_per_worker == 0:
        ray.get(ray.remote(num_cpus=1)(require_compiler).remote())


def train(settings: TrainSettings, worker: Callable[[dict[str, Any]], None] = train_worker) -> str:
    """Run or continue the training; returns where the exported model is.

    While it runs, SIGTERM makes the workers save a checkpoint and end. However it ends, it leaves a report.html.

    Args:
        settings: With absolute paths, see `resolve_settings`.
        worker: What each worker runs on `settings` as a dict, and the `supervisor`.

    Raises:
        TrainingStopped: SIGTERM came; there is a checkpoint of the last step, if any was done.
        TrainingError: A worker failed more often than `run.max_failures` allows, or in a way that no restart mends.
        ResourceError: The workers did not come within `run.start_timeout_s`.
    """
    show_worker_lines_only()
    storage.write_bytes(storage.join(run_uri(settings.run), "config.yaml"), dump_settings(settings).encode())
    with recorded(run_uri(settings.run), stopped=(TrainingStopped, KeyboardInterrupt)):
        return _train(settings, worker)


def _train(settings: TrainSettings, worker: Callable[[dict[str, Any]], None]) -> str:
    drop_record(run_uri(settings.run))
    evaluator = _start_evaluator(settings)
    supervisor = start_supervisor()
    config = {"settings": yaml.safe_load(dump_settings(settings)), "supervisor": supervisor}
    trainer = _trainer(settings, config, worker)
    lookout = Lookout(supervisor, settings.run.start_timeout_s, trainer.abandon)
    with _keeper(settings, supervisor, evaluator) as keeper, lookout:
        try:
            trainer.fit()
        except WorkerGroupError as error:
            rank, failure = min(error.worker_failures.items())
            raise TrainingError(f"worker {rank} failed: {failure}") from error
        except TrainingFailedError as error:
            raise TrainingError(str(error)) from error
        except ray.exceptions.RayActorError as error:
            _raise_why_abandoned(settings, lookout, error)
        outcome: Any = ray.get(supervisor.outcome.remote())
        if outcome and outcome["kind"] == "stopped":
            raise TrainingStopped(outcome["message"])
        if outcome:
            raise TrainingError(outcome["message"])
        evaluated = keeper.finish(interrupted=lambda: lookout.stopped)
        if settings.evaluation:
            uri = run_uri(settings.run)
            log_late_scores(uri, lambda folder: open_trackers(settings, uri, folder))
        if not evaluated:
            raise TrainingStopped("trained and exported, and stopped while the last checkpoints were evaluated")
    return export_uri(settings.run)


def _start_evaluator(settings: TrainSettings) -> RemoteEvaluator | None:
    if not settings.evaluation:
        return None
    evaluator = RemoteEvaluator(settings, run_uri(settings.run))
    if settings.scaling.is_elastic and not evaluator.start(settings.run.start_timeout_s):
        raise ResourceError(
            f"the run has waited {settings.run.start_timeout_s:g} s (run.start_timeout_s) for an evaluator with "
            f"{settings.evaluation.cpus} CPU and {settings.evaluation.gpus} GPU: lower evaluation.cpus or "
            "evaluation.gpus, or use a larger cluster"
        )
    return evaluator


def _keeper(settings: TrainSettings, supervisor: Any, evaluator: RemoteEvaluator | None) -> CheckpointKeeper:
    run, evaluation = settings.run, settings.evaluation

    def next_save(count: int) -> int:
        return ray.get(supervisor.saves_after.remote(count))

    if not evaluation:
        return CheckpointKeeper(run_uri(run), run.keep, next_save)
    measure = Measure.of(evaluation, [Manifest.load(folder).identity() for folder in evaluation.folders])
    return CheckpointKeeper(run_uri(run), run.keep, next_save, evaluator, measure, evaluation.every)


class _Trainer(TorchTrainer):
    """Ray's trainer, which can be abandoned from another thread; Ctrl-C stays an ordinary KeyboardInterrupt."""

    _controller: Any = None

    def abandon(self) -> None:
        """End the run from the driver's side; its workers go with it."""
        if self._controller is not None:
            ray.kill(self._controller)

    def _register_sigint_handler(self, controller: Any) -> None:
        self._controller = controller


def _raise_why_abandoned(settings: TrainSettings, lookout: Lookout, error: Exception) -> NoReturn:
    if lookout.stopped:
        raise TrainingStopped("stopped before its workers had started") from error
    if lookout.too_quiet:
        scaling, now = settings.scaling, ray.available_resources()
        raise ResourceError(
            f"the run has waited {settings.run.start_timeout_s:g} s (run.start_timeout_s) for {scaling.bounds[0]} "
            f"workers with {scaling.cpus_per_worker} CPU and {scaling.gpus_per_worker} GPU each; free in the cluster "
            f"are {now.get('CPU', 0):g} CPU and {now.get('GPU', 0):g} GPU on {len(ray.nodes())} nodes. Run the same "
            "command again when there are more, or lower scaling.num_workers"
        ) from error
    raise TrainingError(f"Ray Train's controller died: {error}") from error


def _trainer(settings: TrainSettings, config: dict[str, Any], worker: Callable[[dict[str, Any]], None]) -> _Trainer:
    run, scaling = settings.run, settings.scaling
    filesystem, path = _ray_storage(run.storage)
    environment = worker_environment(scaling.cpus_per_worker, scaling.gpus_per_worker > 0)
    elastic: dict[str, Any] = {"elastic_resize_monitor_interval_s": scaling.resize_every_s}
    return _Trainer(
        worker,
        train_loop_config=config,
        # Longer than the watchdog waits: it says who hangs, a collective that times out does not.
        torch_config=TorchConfig(timeout_s=int(2 * run.hang_timeout_s) + 60),
        scaling_config=ScalingConfig(
            num_workers=scaling.num_workers,  # type: ignore[arg-type]  # ray.train is typed as its first version
            use_gpu=scaling.gpus_per_worker > 0,
            resources_per_worker={"CPU": scaling.cpus_per_worker}
            | ({"GPU": scaling.gpus_per_worker} if scaling.gpus_per_worker else {}),
            placement_strategy=scaling.placement,
            **(elastic if scaling.is_elastic else {}),
        ),
        run_config=RunConfig(  # type: ignore[arg-type]  # ray.train is typed as its first version
            name=run.name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=run.max_failures),
            worker_runtime_env={"env_vars": environment},
            logging_config=LoggingConfig(log_level="WARNING"),
            callbacks=[TellLostRanks(config["supervisor"], run_uri(run))],
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
        # As patient as `pipelines.storage`. By its default, three seconds without a byte are an error, three of which
        # would end the run: Ray's controller writes down there which checkpoints there are.
        connect_timeout=10,
        request_timeout=30,
        retry_strategy=pyarrow.fs.AwsStandardS3RetryStrategy(max_attempts=6),
    )
    return filesystem, uri.split("://", 1)[1]
