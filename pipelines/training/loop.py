"""What every worker of a training run does, from an empty process to the exported checkpoint."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from flashsloth import FlashSlothProcessor
from flashsloth.image_processing_flashsloth import normalize_pixels
from pipelines import storage
from pipelines.feed import BatchLoader, Feed, MicroBatch, Position, PreparedRows
from pipelines.shards.manifest import Manifest
from pipelines.training.checkpoint import Progress, RunIdentity, restore, save_checkpoint
from pipelines.training.export import consolidated, read_export_step, write_export
from pipelines.training.metrics import RunLog, StepMeter, TrainingDiverged
from pipelines.training.optimization import (
    build_optimizer,
    deepspeed_config,
    freeze,
    schedule_factor,
    set_learning_rates,
)
from pipelines.training.process import prepare_process, seed_step
from pipelines.training.settings import RunSettings, TrainSettings
from pipelines.training.start import build_model, load_processor

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine


def run_uri(run: RunSettings) -> str:
    """The folder of a run: checkpoints, metrics and the export lie in it."""
    return storage.join(storage.resolve(run.storage), run.name)


def export_uri(run: RunSettings) -> str:
    """Where the trained model goes, a `from_pretrained` folder."""
    return storage.join(run_uri(run), "export")


def run_identity(settings: TrainSettings, manifests: list[Manifest]) -> RunIdentity:
    """What must stay the same between a run and its continuation."""
    return RunIdentity(
        data=[manifest.identity() for manifest in manifests],
        seed=settings.run.seed,
        global_batch=settings.batch.global_size,
        length_group=settings.data.length_group,
        train_parts=sorted(settings.train_parts),
        precision=settings.precision,
        zero_stage=settings.deepspeed.stage,
        num_workers=settings.scaling.num_workers,
    )


def train_worker(config: dict[str, Any]) -> None:
    """The function that Ray Train runs on each worker. `config` is `TrainSettings.model_dump()`."""
    settings = TrainSettings.model_validate(config)
    device = prepare_process(settings.scaling.cpus_per_worker, settings.scaling.gpus_per_worker > 0)
    processor = load_processor(settings.model)
    rows = PreparedRows(settings.data.folders, settings.data.cache_dir)
    run = WorkerRun(settings, processor, rows, device)
    start = restore(run.engine, run.identity)
    run.train(start)
    run.export(nothing_new=start.step >= run.num_steps)


class WorkerRun:
    """One worker's side of the run."""

    def __init__(
        self, settings: TrainSettings, processor: FlashSlothProcessor, rows: PreparedRows, device: torch.device
    ) -> None:
        self.settings = settings
        self.processor = processor
        self.rows = rows
        self.device = device
        self.feed = Feed(
            rows.num_tokens,
            rows.num_loss_tokens,
            rows.has_image,
            settings.batch.global_size,
            settings.run.seed,
            settings.data.length_group,
        )
        self.num_steps = settings.max_steps or settings.epochs * self.feed.batches_per_epoch
        self.identity = run_identity(settings, [dataset.manifest for dataset in rows.datasets])
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        model = build_model(settings.model, processor, settings.precision, settings.run.seed)
        freeze(model, settings.train_parts)
        self.optimizer = build_optimizer(model, settings.optim)
        self.engine = _initialize(model, self.optimizer, settings)

    def train(self, start: Progress) -> None:
        """Train from `start` to the last step."""
        if start.step >= self.num_steps:
            return
        step, position = start.step, start.position
        meter = StepMeter(self.device)
        log = RunLog(run_uri(self.settings.run), self.num_steps, start.step) if self.rank == 0 else None
        with self.loader(position, self.num_steps - step) as loader:
            for micro_batches in grouped_by_step(loader):
                self.step(step, micro_batches, meter)
                step, position = step + 1, micro_batches[-1].batch.after
                meter.add_step(micro_batches[-1].batch)
                last = step == self.num_steps
                if last or step % self.settings.run.log_every == 0:
                    self._log(log, meter, step, position, loader.waited_s)
                if last or step % self.settings.run.checkpoint_every == 0:
                    save_checkpoint(self.engine, Progress(step=step, position=position), self.identity, {"step": step})
                    if log:
                        log.flush()
        if log:
            log.close()

    def export(self, nothing_new: bool) -> None:
        """Write the trained model as a `from_pretrained` folder, unless this run did so before."""
        target = export_uri(self.settings.run)
        written = nothing_new and read_export_step(target) == self.engine.global_steps
        dist.barrier()  # nobody writes before everybody has looked
        if written:
            return
        weights = consolidated(self.engine)
        if weights is not None:
            write_export(target, self.engine.module, weights, self.processor, self.engine.global_steps)
            print(f"exported the model to {target}", flush=True)
        dist.barrier()

    def step(self, step: int, micro_batches: list[MicroBatch], meter: StepMeter) -> None:
        """One optimizer step on this rank's share of a global batch."""
        seed_step(self.settings.run.seed, step, self.rank)
        set_learning_rates(self.optimizer, self._factor(step))
        for micro in micro_batches:
            self.engine.set_gradient_accumulation_boundary(micro.is_last)
            # The loss is the mean over the loss tokens of the global batch, so it depends neither on the micro-batch
            # nor on the number of workers. DeepSpeed averages gradients over workers, hence their number here.
            share = max(1, micro.batch.num_loss_tokens) / self.world_size
            inputs = self._on_device(micro.inputs)
            loss = self.engine(**inputs, num_items_in_batch=share, use_cache=False).loss
            self.engine.backward(loss, scale_wrt_gas=False)
            meter.add_loss(loss)
        self.engine.step()

    def _on_device(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        moved = {name: tensor.to(self.device, non_blocking=True) for name, tensor in inputs.items()}
        if "pixel_values" in moved:  # travels as uint8: a quarter of the bytes
            moved["pixel_values"] = normalize_pixels(moved["pixel_values"])
        return moved

    def loader(self, position: Position, num_batches: int) -> BatchLoader:
        """This rank's micro-batches of the next `num_batches` global batches."""
        return BatchLoader(
            self.rows,
            self.feed.walk(position, num_batches),
            rank=self.rank,
            world_size=self.world_size,
            micro_batch=self.settings.batch.micro_size,
            processor=self.processor,
            threads=self.settings.data.reader_threads,
            prefetch=self.settings.data.prefetch,
        )

    def _log(self, log: RunLog | None, meter: StepMeter, step: int, position: Position, waited_s: float) -> None:
        norm = self.engine.get_global_grad_norm()
        figures = meter.read(waited_s, None if norm is None else float(norm))
        if log:
            figures["lr"] = self.settings.optim.lr * self._factor(step - 1)
            figures["epoch"] = position.epoch + position.batch / self.feed.batches_per_epoch
            figures["samples_seen"] = position.samples_seen
            figures["seconds_left"] = figures["seconds_per_step"] * (self.num_steps - step)
            log.write(step, figures)
        if not torch.tensor(figures["loss"]).isfinite():
            raise TrainingDiverged(
                f"the loss is {figures['loss']} at step {step} (rows up to number {position.samples_seen} of the run): "
                "lower optim.lr, or look at the data of the last steps"
            )

    def _factor(self, step: int) -> float:
        return schedule_factor(step, self.num_steps, self.settings.optim)


def _initialize(model: torch.nn.Module, optimizer: torch.optim.Optimizer, settings: TrainSettings) -> DeepSpeedEngine:
    # DeepSpeed chooses its accelerator when it is imported, from the environment that only workers have.
    import deepspeed

    deepspeed.utils.logger.setLevel("WARNING")
    with contextlib.redirect_stdout(io.StringIO()):  # it prints that its operator was built
        deepspeed.init_distributed()
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=deepspeed_config(settings))
    return engine


def grouped_by_step(loader: BatchLoader) -> Iterator[list[MicroBatch]]:
    """The micro-batches of one optimizer step at a time."""
    step: list[MicroBatch] = []
    for micro in loader:
        step.append(micro)
        if micro.is_last:
            yield step
            step = []
