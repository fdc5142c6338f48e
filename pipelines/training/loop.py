"""What every worker of a training run does, from an empty process to the exported checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.backbones import BackboneError
from flashsloth.image_processing_flashsloth import normalize_pixels
from pipelines import storage
from pipelines.feed import BatchLoader, Feed, MicroBatch, Mixture, Position, PreparedRows
from pipelines.shards.manifest import Manifest
from pipelines.training.checkpoint import CheckpointError, Progress, RunIdentity, restore
from pipelines.training.compilation import compile_layers
from pipelines.training.divergence import BadSteps, TrainingDiverged
from pipelines.training.engine import initialize, update_weights
from pipelines.training.environment import environment_facts, machine_name
from pipelines.training.events import EventLog, record
from pipelines.training.export import ExportError, consolidated, read_export_step, write_export
from pipelines.training.flops import FlopCounter, Peak, find_peak
from pipelines.training.host import Host, Outcome, RayHost, Request
from pipelines.training.lora import merge_adapters
from pipelines.training.memory import MemoryPlanError, choose_stage, count_sizes, largest_work
from pipelines.training.metrics import StepMeter
from pipelines.training.optimization import (
    build_optimizer,
    learning_rates,
    schedule_factor,
    set_learning_rates,
)
from pipelines.training.process import prepare_process, seed_step
from pipelines.training.ranks import Ranks
from pipelines.training.run_log import RunLog, read_metrics
from pipelines.training.saver import CheckpointSaver
from pipelines.training.settings import RunSettings, TrainSettings
from pipelines.training.start import StartError, build_learner, load_processor, start_identity
from pipelines.training.state import StateError
from pipelines.training.tracking import open_trackers
from pipelines.training.watchdog import Watchdog


def run_uri(run: RunSettings) -> str:
    """The folder of a run: checkpoints, metrics and the export lie in it."""
    return storage.join(storage.resolve(run.storage), run.name)


def export_uri(run: RunSettings) -> str:
    """Where the trained model goes, a `from_pretrained` folder."""
    return storage.join(run_uri(run), "export")


def run_identity(settings: TrainSettings, manifests: list[Manifest], start: dict[str, str]) -> RunIdentity:
    """What must stay the same between a run and its continuation; `start` is what `start_identity` says."""
    return RunIdentity(
        data=[manifest.identity() for manifest in manifests],
        seed=settings.run.seed,
        global_batch=settings.batch.global_size,
        length_group=settings.data.length_group,
        weights=settings.data.weights,
        train_parts=sorted(settings.train_parts),
        lora=settings.lora.model_dump(mode="json") if settings.lora else None,
        precision=settings.precision,
        start=start,
    )


def train_worker(config: dict[str, Any]) -> None:
    """The function that Ray Train runs on each worker.

    Args:
        config: `settings`, a dump of `TrainSettings`, and `supervisor`, the handle of a `Supervisor`.
    """
    settings = TrainSettings.model_validate(config["settings"])
    device = prepare_process(settings.scaling.cpus_per_worker, settings.scaling.gpus_per_worker > 0)
    run_worker(settings, device, RayHost(config["supervisor"], dist.get_rank()))


HOPELESS = (BackboneError, ExportError, StartError, MemoryPlanError, CheckpointError, StateError, TrainingDiverged)
"""The same on every rank, and no restart mends them."""


def run_worker(settings: TrainSettings, device: torch.device, host: Host) -> None:
    """One rank's whole run, in a process group that exists: restore, train, export."""
    processor = load_processor(settings.model)
    data = settings.data
    rows = PreparedRows(data.folders, data.cache_dir, int(data.cache_gib * 2**30))
    uri = run_uri(settings.run)
    events = EventLog(uri, "worker") if dist.get_rank() == 0 else None
    # Longer than the watchdog waits: it says who hangs, a collective that times out does not.
    ranks = Ranks(2 * settings.run.hang_timeout_s, events.note if events else None)

    def tell(verdict: str) -> None:
        record(uri, "watchdog", "hung", message=verdict)

    with Watchdog(ranks, settings.run.hang_timeout_s, settings.run.start_timeout_s, tell) as watchdog:
        try:
            run = WorkerRun(settings, processor, rows, device, host, ranks, watchdog, events)
            start = restore(run.engine, uri, run.identity, ranks)
            host.clean(uri, ranks)
            run.introduce(start.step)
            run.train(start)
            run.export(nothing_new=start.step >= run.num_steps)
        except RunStopped as stop:
            host.end(Outcome(kind="stopped", message=str(stop)))
        except HOPELESS as error:
            host.end(Outcome(kind="failed", message=str(error)))
        finally:
            if events:
                events.close()


class RunStopped(RuntimeError):
    """The run ends early because it was asked to, with a checkpoint of its last step."""


class WorkerRun:
    """One worker's side of the run."""

    def __init__(
        self,
        settings: TrainSettings,
        processor: FlashSlothProcessor,
        rows: PreparedRows,
        device: torch.device,
        host: Host,
        ranks: Ranks,
        watchdog: Watchdog,
        events: EventLog | None = None,
    ) -> None:
        self.processor = processor
        self.rows = rows
        self.device = device
        self.host = host
        self.ranks = ranks
        self.watchdog = watchdog
        self.events = events
        self.rank, self.world_size = ranks.rank, ranks.world_size
        self.feed = Feed(
            rows.num_tokens,
            rows.num_loss_tokens,
            rows.has_image,
            settings.batch.global_size,
            settings.run.seed,
            settings.data.length_group,
            Mixture(rows.sizes, settings.data.weights) if settings.data.weights else None,
        )
        self.num_steps = settings.max_steps or settings.epochs * self.feed.batches_per_epoch
        # Hashed by one rank: weights without a manifest are read as a whole.
        begin = ranks.share(start_identity(settings.model) if ranks.rank == 0 else None)
        self.identity = run_identity(settings, [dataset.manifest for dataset in rows.datasets], begin)
        model = build_learner(settings, processor)
        self.settings = settings = self._planned(settings, model)
        if settings.model.compile:
            compile_layers(model)
        features = any(dataset.manifest.payload == "features" for dataset in rows.datasets)
        self.flops = FlopCounter(model.config, settings.train_parts, features, settings.lora)
        self.optimizer = build_optimizer(model, settings.optim)
        self.engine = initialize(model, self.optimizer, settings, self.world_size)
        self.stage = self.engine.zero_optimization_stage()
        self.bad_steps = BadSteps(settings.run.max_bad_steps)
        stated = settings.scaling.peak_tflops
        self.peak: Peak = find_peak(stated, device, torch.bfloat16 if settings.precision == "bf16" else torch.float32)

    def introduce(self, start_step: int) -> None:
        """Note where and with what this attempt begins. Collective."""
        machines = self.ranks.gather(machine_name(self.device))
        if self.events:
            logged = read_metrics(run_uri(self.settings.run))
            self.events.write(
                "attempt",
                step=start_step,
                num_steps=self.num_steps,
                # What a killed attempt had done and logged after the checkpoint is done again.
                reached=max(start_step, logged[-1]["step"] if logged else 0),
                world_size=self.world_size,
                machines=machines,
                peak=self.peak._asdict(),
                data=self.identity.data,
                environment=environment_facts(),
            )

    def train(self, start: Progress) -> None:
        """Train from `start` to the last step.

        Raises:
            RunStopped: It was asked to stop, and has saved a checkpoint.
            CheckpointError: Checkpoints cannot be saved.
            TrainingDiverged: Too many steps in a row had no finite gradients.
        """
        if start.step >= self.num_steps:
            return
        step, position = start.step, start.position
        meter = StepMeter(self.device, self.flops, self.peak.tflops)
        log = self._run_log(step) if self.rank == 0 else None
        saver = self._saver()
        with log or contextlib.nullcontext(), self.loader(position, self.num_steps - step) as loader:
            for micro_batches in grouped_by_step(loader):
                self.watchdog.beat("trains")
                self.step(step, micro_batches, meter)
                step, position = step + 1, micro_batches[-1].batch.after
                meter.add_step(micro_batches[-1].batch)
                last = step == self.num_steps
                request = self._agree(step, micro_batches[-1].batch.rows, saver)
                if last or step % self.settings.run.log_every == 0:
                    self._log(log, meter, step, position, loader.waited_s, saver.blocked_s)
                if last or request or step % self.settings.run.checkpoint_every == 0:
                    self.watchdog.beat("saves a checkpoint")
                    saver.save(self.engine, Progress(step=step, position=position))
                    if log:
                        log.flush()
                if last or request:
                    saver.settle()
                if request == Request.STOP and not last:
                    raise RunStopped(f"stopped at step {step} of {self.num_steps}, with a checkpoint of this step")
                self.watchdog.beat("waits for data")

    def export(self, nothing_new: bool) -> None:
        """Write the trained model as a `from_pretrained` folder, unless this run did so before."""
        target = export_uri(self.settings.run)
        # Looked up by one rank: nobody writes before everybody has looked.
        written = self.ranks.share(nothing_new and read_export_step(target) == self.num_steps)
        if written:
            return
        self.watchdog.beat("exports the model")
        weights = consolidated(self.engine)
        if weights is not None:
            lora = self.settings.lora
            weights = merge_adapters(weights, lora) if lora else weights
            write_export(target, self.engine.module, weights, self.processor, self.num_steps)
            how = f", with its adapters of rank {lora.rank} merged into the weights" if lora else ""
            print(f"exported the model to {target}{how}", flush=True)
        self.ranks.barrier()

    def _planned(self, settings: TrainSettings, model: FlashSlothForConditionalGeneration) -> TrainSettings:
        """The settings with the ZeRO stage that they leave open, said aloud. Collective."""
        gpu = torch.cuda.get_device_properties(self.device).total_memory if self.device.type == "cuda" else None
        memories = [memory for memory in self.ranks.gather(gpu) if memory is not None]
        rows = self.rows
        work = largest_work(settings.batch, rows.num_tokens, rows.num_loss_tokens, rows.has_image)
        smallest = min(memories, default=None)
        plan = choose_stage(settings, model.config, count_sizes(model), work, self.world_size, smallest)
        self.ranks.say(plan.reason)
        return settings.model_copy(update={"deepspeed": settings.deepspeed.model_copy(update={"stage": plan.stage})})

    def _run_log(self, start_step: int) -> RunLog:
        settings, uri = self.settings, run_uri(self.settings.run)
        evaluated = settings.evaluation is not None
        return RunLog(uri, self.num_steps, start_step, lambda folder: open_trackers(settings, uri, folder), evaluated)

    def _saver(self) -> CheckpointSaver:
        run = self.settings.run
        return CheckpointSaver(run_uri(run), self.identity, self.ranks, run.max_failed_saves, self._report)

    def _report(self, name: str, step: int) -> None:
        if self.events:
            self.events.write("saved", step=step, name=name)
        self.host.report(name, step)

    def _agree(self, step: int, rows: np.ndarray, saver: CheckpointSaver) -> Request:
        """One exchange per step, so that all ranks report, save, stop and fail at the same one."""
        request, busy, any_bad = self.ranks.largest([self.host.request(), not saver.is_done, self.update.skipped])
        if not busy:
            saver.settle()
        try:
            self.bad_steps.add(step, bool(any_bad), rows, self.rows, self.ranks)
        except TrainingDiverged:
            saver.settle()  # what was saved before shall be there
            raise
        return Request(request)

    def step(self, step: int, micro_batches: list[MicroBatch], meter: StepMeter) -> None:
        """One optimizer step on this rank's share of a global batch."""
        seed_step(self.settings.run.seed, step, self.rank)
        set_learning_rates(self.optimizer, self._factor(step))
        losses = []
        for micro in micro_batches:
            self.engine.set_gradient_accumulation_boundary(micro.is_last)
            inputs = self._on_device(micro)
            loss = self.engine(**inputs, num_items_in_batch=micro.loss_tokens, use_cache=False).loss
            # A tensor of its own: where it is the very one that forward returned, DeepSpeed's stage 0 divides the
            # gradient by the number of accumulation steps, although it is told not to.
            self.engine.backward(1.0 * loss, scale_wrt_gas=False)
            losses.append(loss.detach())
            meter.add_micro_batch(micro)
        self.update = update_weights(self.engine, self.settings.optim.max_grad_norm)
        meter.add_loss(torch.stack(losses).sum())

    def _on_device(self, micro: MicroBatch) -> dict[str, torch.Tensor]:
        moved = {name: tensor.to(self.device, non_blocking=True) for name, tensor in micro.inputs.items()}
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
            micro_batch=self.settings.batch.micro_batch,
            processor=self.processor,
            threads=self.settings.data.reader_threads,
            prefetch=self.settings.data.prefetch,
            pin_memory=self.device.type == "cuda",
        )

    def _log(
        self, log: RunLog | None, meter: StepMeter, step: int, position: Position, waited_s: float, saving_s: float
    ) -> None:
        norm = self.update.grad_norm
        figures = meter.read(waited_s, saving_s, None if norm is None else float(norm))
        if log:
            figures |= learning_rates(self.settings.optim, self.settings.train_parts, self._factor(step - 1))
            figures["epoch"] = position.epoch + position.batch / self.feed.batches_per_epoch
            figures["samples_seen"] = position.samples_seen
            figures["seconds_left"] = figures["seconds_per_step"] * (self.num_steps - step)
            log.write(step, figures)

    def _factor(self, step: int) -> float:
        return schedule_factor(step, self.num_steps, self.settings.optim)


def grouped_by_step(loader: BatchLoader) -> Iterator[list[MicroBatch]]:
    """The micro-batches of one optimizer step at a time."""
    step: list[MicroBatch] = []
    for micro in loader:
        step.append(micro)
        if micro.is_last:
            yield step
            step = []
