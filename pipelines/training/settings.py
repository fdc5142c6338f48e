"""The settings of `jobs/train.py`, section by section. A recipe names the ones it changes."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BeforeValidator, Field, PositiveInt, model_validator

from pipelines.feed.sharing import TokenBudget
from pipelines.settings import JobSettings, Section
from pipelines.training.model_settings import LoraSettings, ModelSettings, PartName
from pipelines.training.tracking_settings import TrackingSettings

Metric = Literal["loss", "exact_match"]
NonNegative = Annotated[float, Field(ge=0)]


class DataSettings(Section):
    """What is read."""

    folders: Annotated[list[str], Field(min_length=1)]
    """Prepared folders, local or s3://; an epoch holds each of their rows once, or as `weights` say."""
    weights: list[Annotated[float, Field(gt=0)]] | None = None
    """How often an epoch goes through each folder: 2 holds its rows twice, 0.25 a quarter of them, by turns."""
    cache_dir: str | None = None
    """Where shards of an object store are kept on the worker's disk."""
    cache_gib: NonNegative = 64.0
    """Room for them, over all folders. Rows of shards that find none are fetched one by one; 0 keeps no shard."""
    length_group: PositiveInt = 8
    """Global batches that are sorted by length together: more saves padding, 1 leaves each a random draw."""
    reader_threads: PositiveInt = 4
    """Threads per worker that read and decode rows."""
    prefetch: PositiveInt = 4
    """Micro-batches per worker that are kept ready."""

    @model_validator(mode="after")
    def _weight_each(self) -> DataSettings:
        if self.weights and len(self.weights) != len(self.folders):
            raise ValueError(f"data.weights has {len(self.weights)} entries for {len(self.folders)} data.folders")
        return self


class BatchSettings(Section):
    """How many rows make an optimizer step. The number of accumulation steps follows."""

    global_size: PositiveInt = 128
    """Rows per optimizer step, over all workers."""
    micro_size: PositiveInt = 16
    """Rows that one worker puts through the model at once, unless `max_tokens` is given."""
    max_tokens: PositiveInt | None = None
    """Positions, padding included, that one worker puts through the model at once: as many rows as fit."""
    max_images: PositiveInt | None = None
    """With `max_tokens`: images that it puts through the tower at once."""
    pack_to: PositiveInt | None = None
    """With `max_tokens`: pack rows one behind the other into lines of up to this many tokens; hardly any padding."""

    @property
    def micro_batch(self) -> int | TokenBudget:
        """What one worker puts through the model at once, as the feed takes it."""
        return TokenBudget(self.max_tokens, self.max_images, self.pack_to) if self.max_tokens else self.micro_size

    @model_validator(mode="after")
    def _budget_is_whole(self) -> BatchSettings:
        lonely = [name for name in ("max_images", "pack_to") if getattr(self, name) is not None]
        if lonely and not self.max_tokens:
            raise ValueError(f"batch.{lonely[0]} bounds micro-batches of batch.max_tokens, which is not given")
        return self


class OptimSettings(Section):
    """AdamW with warm-up and cosine decay."""

    lr: NonNegative = 2e-5
    """Peak learning rate."""
    part_lr: dict[PartName, NonNegative] = Field(default_factory=dict)
    """Peak learning rates of single parts, where they differ."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of AdamW's two moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegative = 0.0
    """Never applied to biases and norms."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.03
    """Share of all steps over which the learning rate rises from 0."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warm-up: a cosine down to 0, or nothing."""
    max_grad_norm: NonNegative = 1.0
    """Gradients are scaled down to this norm; 0 leaves them."""


class DeepSpeedSettings(Section):
    """How the state of a run is spread over its workers."""

    stage: Annotated[int, Field(ge=0, le=3)] | None = None
    """ZeRO: 1 partitions optimizer states, 2 gradients too, 3 parameters too. By default the lowest of them that fits
    the GPUs by the arithmetic of `pipelines.training.memory`, which `--dry-run` shows; on CPUs 1. A single fp32 worker,
    who has nobody to share with, takes 0."""
    offload: Literal["none", "optimizer", "all"] = "none"
    """Keep in the host's memory: nothing, the optimizer's state (stages 1 to 3), or that and the weights (stage 3)."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further fields of DeepSpeed's configuration, passed through and laid over ours."""


def _one_alone(value: Any) -> Any:
    """A flag that may take two numbers gives one as a list of one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


class ScalingSettings(Section):
    """What a run asks of the cluster."""

    num_workers: Annotated[PositiveInt | tuple[PositiveInt, PositiveInt], BeforeValidator(_one_alone)] = 8
    """Workers, one process each. Two numbers: as many between them as the cluster has room for, at each (re)start."""
    resize_every_s: Annotated[float, Field(gt=0)] = 600.0
    """With two numbers of workers: seconds between looks whether there is room for more."""
    cpus_per_worker: PositiveInt = 8
    """CPUs that a worker reserves."""
    gpus_per_worker: Annotated[int, Field(ge=0, le=1)] = 1
    """1: each worker trains on a GPU of its own. 0: on the CPU."""
    peak_tflops: Annotated[float, Field(gt=0)] | None = None
    """TFLOP/s that a worker's device can do at this precision, for the MFU in the log; of common GPUs it is known."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """How Ray places the workers on the nodes."""

    @property
    def bounds(self) -> tuple[int, int]:
        """The smallest and the largest number of workers."""
        return (self.num_workers, self.num_workers) if isinstance(self.num_workers, int) else self.num_workers

    @property
    def is_elastic(self) -> bool:
        """Whether the number of workers may change while the run goes on."""
        return not isinstance(self.num_workers, int)

    @model_validator(mode="after")
    def _ordered(self) -> ScalingSettings:
        smallest, largest = self.bounds
        if smallest > largest:
            raise ValueError(f"scaling.num_workers: the smallest number {smallest} is above the largest {largest}")
        return self


class EvaluationSettings(Section):
    """Checkpoints are evaluated on a worker of their own while training goes on, and the best one is kept."""

    folders: Annotated[list[str], Field(min_length=1)]
    """Prepared folders that are not trained on, local or s3://."""
    metric: Metric = "loss"
    """What tells the best checkpoint: the loss, or the share of questions answered exactly right (greedily), which is
    then measured beside the loss and takes longer."""
    max_rows: PositiveInt = 1000
    """Rows that are evaluated, spread evenly over all of them and always the same."""
    max_new_tokens: PositiveInt = 64
    """exact_match: the longest answer, in tokens."""
    every: PositiveInt | None = None
    """Steps between two evaluations, a multiple of run.checkpoint_every; by default each checkpoint is evaluated. The
    one after the last step is in any case."""
    cpus: PositiveInt = 4
    """CPUs that the evaluator reserves beside the workers."""
    gpus: Annotated[int, Field(ge=0, le=1)] = 1
    """1: it evaluates on a GPU of its own. 0: on the CPU."""
    timeout_s: Annotated[float, Field(gt=0)] = 3600.0
    """Seconds after which an evaluation counts as hung, and another evaluator begins it anew."""


class RunSettings(Section):
    """Where a run keeps its things, and how often."""

    name: str
    """Name of the run. The same name continues the run from its last checkpoint."""
    storage: str = "outputs"
    """Folder or s3:// prefix that holds the runs; with several machines, one that all of them reach."""
    seed: int = 0
    """Order of the data, start of new parameters, dropout."""
    log_every: PositiveInt = 10
    """Steps between two lines of metrics."""
    checkpoint_every: PositiveInt = 500
    """Steps between two checkpoints; there is always one after the last step."""
    keep: Annotated[int, Field(ge=2)] = 2
    """Newest checkpoints kept, at least 2, so that there is one to fall back to. With `evaluation` the best one stays
    too, and each until it is evaluated."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Restarts from the last checkpoint before a failing run gives up. Machines that are taken away do not count."""
    max_failed_saves: PositiveInt = 3
    """Checkpoints in a row that an object store may refuse before the run ends; it goes on without the first ones."""
    max_bad_steps: PositiveInt = 3
    """Steps in a row without finite gradients before the run ends. Each of them leaves the weights as they are."""
    hang_timeout_s: Annotated[float, Field(gt=0)] = 900.0
    """Seconds without a step after which the run counts as hung; more than the slowest step or save takes."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds that the run waits for its workers, at the start and after each loss of one."""


class TrainSettings(JobSettings):
    """Train FlashSloth on prepared shards with Ray Train and DeepSpeed."""

    model: ModelSettings
    """What the run starts from."""
    train_parts: Annotated[list[PartName], Field(min_length=1)]
    """The parts that learn; all others stay as they are."""
    lora: LoraSettings | None = None
    """With it the language model learns through adapters alone; the other `train_parts` learn as a whole."""
    data: DataSettings
    """What is read."""
    batch: BatchSettings = BatchSettings()
    """Rows per step."""
    epochs: PositiveInt = 1
    """Passes over the data."""
    max_steps: PositiveInt | None = None
    """Optimizer steps, instead of `epochs`."""
    optim: OptimSettings = OptimSettings()
    """AdamW and its schedule."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16 keeps fp32 master weights in the optimizer."""
    deepspeed: DeepSpeedSettings = DeepSpeedSettings()
    """How state is spread over workers."""
    scaling: ScalingSettings = ScalingSettings()
    """What the run asks of the cluster."""
    evaluation: EvaluationSettings | None = None
    """Evaluation of the checkpoints; by default none."""
    run: RunSettings
    """Where the run keeps its things."""
    dry_run: bool = Field(default=False, validation_alias=AliasChoices("dry_run", "dry-run"))
    """Check everything that can be checked without a cluster, say what memory the run needs, and train nothing."""
    tracking: TrackingSettings = TrackingSettings()
    """Who else is told its figures."""

    @model_validator(mode="after")
    def _batches_divide(self) -> TrainSettings:
        # Between the two ends of an elastic run any number may turn up; the feed then evens the shares out.
        for num_workers in self.scaling.bounds:
            at_once = self.batch.micro_size * num_workers
            if self.batch.global_size % at_once and not self.batch.max_tokens:
                raise ValueError(
                    f"batch.global_size {self.batch.global_size} is not divisible by {at_once} "
                    f"(batch.micro_size {self.batch.micro_size} x scaling.num_workers {num_workers})"
                )
        needed = {"none": 0, "optimizer": 1, "all": 3}[self.deepspeed.offload]
        if self.deepspeed.stage is not None and self.deepspeed.stage < needed:
            raise ValueError(
                f"deepspeed.offload {self.deepspeed.offload} needs deepspeed.stage {needed} at least, "
                f"and it is {self.deepspeed.stage}"
            )
        if self.model.compile and 3 in (self.deepspeed.stage, needed):
            raise ValueError(
                "model.compile and ZeRO-3 exclude each other: it gathers weights module by module, inside of what "
                "would be compiled. Use deepspeed.stage 1 or 2, without deepspeed.offload all"
            )
        if self.deepspeed.stage == 0 and self.precision == "bf16":
            raise ValueError("deepspeed.stage 0 keeps no fp32 weights beside bf16 ones: use stage 1, or precision fp32")
        if self.lora and "language_model" not in self.train_parts:
            raise ValueError(f"lora is for the language_model, which train_parts {self.train_parts} does not train")
        every = self.evaluation.every if self.evaluation else None
        if every and every % self.run.checkpoint_every:
            raise ValueError(
                f"evaluation.every {every} is not a multiple of run.checkpoint_every {self.run.checkpoint_every}: "
                "checkpoints are what is evaluated"
            )
        unused = sorted(set(self.optim.part_lr) - set(self.train_parts))
        if unused:
            raise ValueError(f"optim.part_lr names {unused}, which train_parts {self.train_parts} does not train")
        return self
