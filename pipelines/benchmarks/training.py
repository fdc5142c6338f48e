"""`jobs/benchmark.py train`: a training step against the published forward, the feed against the step, and padding."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
import torch
from pydantic import Field, PositiveInt

from flashsloth import (
    FlashSlothConfig,
    FlashSlothForConditionalGeneration,
    FlashSlothImageProcessor,
    FlashSlothProcessor,
)
from flashsloth.collation import collate
from flashsloth.image_processing_flashsloth import normalize_pixels
from pipelines.benchmarks.conversations import draw_shapes, write_folder
from pipelines.benchmarks.feeding import feed_alone, measure_padding
from pipelines.benchmarks.machine import describe_machine
from pipelines.benchmarks.published import published_parts, published_shares, zero_image_pass
from pipelines.benchmarks.rounds import Figures, Rounds, take_turns
from pipelines.benchmarks.settings import BenchmarkSettings
from pipelines.benchmarks.table import Bound, Report, Table
from pipelines.feed import BatchLoader, Feed, GlobalBatch, Position, PreparedRows, TokenBudget, model_inputs
from pipelines.scenes.tokenizer import train_tokenizer

# What the instruct recipe trains: everything but the tower.
_FROZEN = "model.vision_tower."
_WORLD = 8
_PUBLISHED, _OURS = "published", "ours"


class TrainBenchmark(BenchmarkSettings):
    """A training step at a mid-size configuration on the CPU."""

    micro_size: PositiveInt = 8
    """Rows that the published step puts through the model at once; our step gets the same rows."""
    feed_rows: PositiveInt = 512
    """Rows of the folder that the feed reads, 0.4 MB each."""
    padding_rows: PositiveInt = 50_000
    """Drawn lengths for the shares of padding."""
    seed: int = 0
    """Of lengths, words, pixels and weights."""
    waiting_steps: PositiveInt = Field(default=6)
    """Steps over which the waiting share is taken."""


def measure_train(settings: TrainBenchmark) -> Report:
    """Run the whole benchmark."""
    if settings.quick:
        settings = settings.model_copy(
            update={"micro_size": 2, "feed_rows": 64, "padding_rows": 2000, "rounds": 1, "waiting_steps": 1}
        )
    machine = describe_machine()
    bench = _Bench(settings)
    rounds = {kind: bench.rounds(kind) for kind in bench.batches}
    step_table, step_bound, ours_per_s = _steps(bench, rounds)
    feed_table, feed_bounds, feed = _feed(bench, ours_per_s)
    padding_table, padding_bounds, padding = measure_padding(settings.padding_rows, settings.seed)
    return Report(
        name="train",
        machine=machine,
        settings=settings.model_dump(),
        tables=[step_table, feed_table, padding_table],
        bounds=[step_bound, *feed_bounds, *padding_bounds],
        measured={kind: each.record() for kind, each in rounds.items()} | {"feed": feed, "padding": padding},
    )


@dataclass(frozen=True)
class Variant:
    """A way to compute the step: which parts run as published."""

    loop_pooling: bool = False
    loop_queries: bool = False
    zero_images: bool = False
    padded: bool = False


# From the published forward to ours, one change after the other.
VARIANTS = {
    _PUBLISHED: Variant(loop_pooling=True, loop_queries=True, zero_images=True, padded=True),
    "+ pooling in one reshape": Variant(loop_queries=True, zero_images=True, padded=True),
    "+ EmbQ grouped by image": Variant(zero_images=True, padded=True),
    "+ no zero images for text": Variant(padded=True),
    _OURS: Variant(),  # + packed
}


class _Bench:
    """Model, data and batches; every variant trains a copy of one model on the same rows."""

    def __init__(self, settings: TrainBenchmark) -> None:
        self.settings = settings
        self.processor = _processor()
        shapes = draw_shapes(settings.feed_rows, settings.seed)
        name = f"conversations-{settings.seed}-{settings.feed_rows}"
        folder = write_folder(Path(settings.output) / "work" / name, shapes, self.processor, settings.seed)
        self.rows = PreparedRows([folder])
        self.batches = {
            "image rows": self._published_batch(self.rows.has_image),
            "text rows": self._published_batch(~self.rows.has_image),
        }
        torch.manual_seed(settings.seed)
        self._model = _model(self.processor)

    def _published_batch(self, wanted: np.ndarray) -> np.ndarray:
        """Row numbers of one rank's share of a global batch, as the published sampler deals it out."""
        chosen = np.flatnonzero(wanted)[: self.settings.micro_size * _WORLD]
        shares = published_shares(self.rows.num_tokens[chosen], self.settings.micro_size, _WORLD)
        return chosen[shares[0]]

    def rounds(self, kind: str) -> Rounds:
        """Every variant's step on the batch `kind`, in turns."""
        steps = {name: self._stepper(variant, self.batches[kind]) for name, variant in VARIANTS.items()}
        # Warms up and makes the optimizer's state. The variants must compute the same, or their times compare nothing.
        losses = {name: step()["loss"] for name, step in steps.items()}
        if max(losses.values()) - min(losses.values()) > 1e-4:
            raise ValueError(f"the variants' losses on {kind} differ by more than 1e-4: {losses}")
        return take_turns(steps, self.settings.rounds, say=lambda line: print(f"{kind}: {line}", flush=True))

    def _stepper(self, variant: Variant, rows: np.ndarray) -> Callable[[], Figures]:
        model = copy.deepcopy(self._model)
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-5)
        prepared = list(self._inputs(variant, rows))

        def step() -> Figures:
            start, cpu_start = time.perf_counter(), time.process_time()
            loss = 0.0
            with published_parts(model, variant.loop_pooling, variant.loop_queries):
                for inputs, loss_tokens in prepared:
                    loss += _backward(model, inputs, loss_tokens, variant.zero_images)
            optimizer.step()
            optimizer.zero_grad()
            seconds = time.perf_counter() - start
            cpu_s = time.process_time() - cpu_start  # of all threads; what is left to compare on a busy machine
            return {"seconds": seconds, "cpu_s": cpu_s, "rows_per_s": len(rows) / seconds, "loss": loss}

        return step

    def _inputs(self, variant: Variant, rows: np.ndarray) -> list[tuple[dict[str, torch.Tensor], float]]:
        tokens, loss_tokens = (int(each[rows].sum()) for each in (self.rows.num_tokens, self.rows.num_loss_tokens))
        if variant.padded:
            samples = [model_inputs(self.rows.read(int(row)), self.processor) for row in rows]
            inputs = collate(samples, self.processor.pad_token_id)
            if "pixel_values" not in inputs:
                inputs["pixel_values"] = self._no_pixels()
            return [(inputs, loss_tokens)]
        batch = GlobalBatch(rows, tokens, loss_tokens, Position())
        with self._loader([batch]) as loader:
            return [(micro.inputs, micro.loss_tokens) for micro in loader]

    def _no_pixels(self) -> torch.Tensor:
        side = self.processor.image_processor.size
        return torch.zeros(0, 1, 3, side, side, dtype=torch.uint8)

    def _loader(self, batches: list[GlobalBatch]) -> BatchLoader:
        longest = int(self.rows.num_tokens.max())
        return BatchLoader(
            self.rows,
            iter(batches),
            rank=0,
            world_size=1,
            micro_batch=TokenBudget(tokens=2 * longest, line=max(1024, longest)),
            processor=self.processor,
        )

    def waiting_share(self) -> float:
        """The share of a run's time that its steps wait for the feed, reading and training at once."""
        feed = Feed(
            self.rows.num_tokens,
            self.rows.num_loss_tokens,
            self.rows.has_image,
            self.settings.micro_size,
            self.settings.seed,
        )
        model = copy.deepcopy(self._model)
        optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=1e-5)
        start = time.perf_counter()
        with self._loader(list(feed.walk(Position(), self.settings.waiting_steps))) as loader:
            for micro in loader:
                _backward(model, micro.inputs, micro.loss_tokens, zero_images=False)
                if micro.is_last:
                    optimizer.step()
                    optimizer.zero_grad()
            return loader.waited_s / (time.perf_counter() - start)


def _backward(
    model: FlashSlothForConditionalGeneration, inputs: dict[str, torch.Tensor], loss_tokens: float, zero_images: bool
) -> float:
    pixels = normalize_pixels(inputs["pixel_values"])
    moved = inputs | {"pixel_values": pixels}
    loss = model(**moved, num_items_in_batch=loss_tokens, use_cache=False).loss
    # Without any image our forward sends one zero image through the tower by itself.
    without = len(inputs["input_ids"]) - max(1, len(pixels))
    if zero_images and without:
        loss = loss + zero_image_pass(model, pixels, without)
    loss.backward()
    return loss.item()


def _steps(bench: _Bench, rounds: dict[str, Rounds]) -> tuple[Table, Bound, float]:
    """The table of steps, its bound, and the samples per second of our step."""
    share = {"image rows": float(bench.rows.has_image.mean()), "text rows": float(1 - bench.rows.has_image.mean())}

    def blended(name: str) -> list[float]:
        """Seconds per row over an epoch of the mix, round by round."""
        per_kind = [
            [share[kind] / each[name]["rows_per_s"] for each in found.figures] for kind, found in rounds.items()
        ]
        return [sum(parts) for parts in zip(*per_kind, strict=True)]

    base = blended(_PUBLISHED)
    gains = {name: [b / own for b, own in zip(base, blended(name), strict=True)] for name in VARIANTS}
    cells = [
        [
            name,
            *(f"{found.spread(name, 'seconds').median:.2f}" for found in rounds.values()),
            *(f"{1 / found.ratio(name, _PUBLISHED, 'seconds').median:.2f}x" for found in rounds.values()),
            f"{float(np.median(gains[name])):.2f}x",
        ]
        for name in VARIANTS
    ]
    config = bench._model.config
    table = Table(
        title="One training step (forward, backward, AdamW; tower frozen)",
        columns=["variant", *(f"{kind}, s" for kind in rounds), *(f"{kind}, gain" for kind in rounds), "epoch, gain"],
        rows=cells,
        notes=[
            f"{bench.settings.micro_size} rows a step, one rank's share of a batch as the published sampler deals it; "
            f"language model {config.text_config.num_hidden_layers} layers of {config.text_config.hidden_size}, tower "
            f"{config.vision_config.num_hidden_layers} of {config.vision_config.hidden_size} over 729 patches; fp32. "
            f"The last row adds packing. 'epoch' weighs the two kinds as the mix does.",
        ],
    )
    bound = Bound(
        name="training step against the published forward",
        sense="at least",
        wanted=1.5,
        measured=float(np.median(gains[_OURS])),
    )
    return table, bound, 1 / mean(blended(_OURS))


def _feed(bench: _Bench, ours_per_s: float) -> tuple[Table, list[Bound], list[Figures]]:
    runs = []
    for _ in range(bench.settings.rounds):
        rows = PreparedRows([dataset.folder for dataset in bench.rows.datasets])
        runs.append(feed_alone(rows, bench.processor, 64, bench.settings.micro_size, threads=1))
    rate = float(np.median([run["rows_per_s"] for run in runs]))
    waiting = bench.waiting_share()
    table = Table(
        title="Feed alone (local disk, pixels, one reader thread, hashes verified)",
        columns=["what", "figure"],
        rows=[
            ["feed, samples/s", f"{rate:,.0f}"],
            ["step, samples/s", f"{ours_per_s:.2f}"],
            ["feed / step", f"{rate / ours_per_s:,.0f}x"],
            ["share of the step spent waiting", f"{waiting:.2%}"],
        ],
    )
    bounds = [
        Bound(name="feed alone against the step", sense="at least", wanted=20, measured=rate / ours_per_s),
        Bound(name="share of the step spent waiting", sense="at most", wanted=0.02, measured=waiting),
    ]
    return table, bounds, runs


def _processor() -> FlashSlothProcessor:
    tokenizer = train_tokenizer(["a question . an answer ."] * 50, 400)
    return FlashSlothProcessor(FlashSlothImageProcessor(), tokenizer, num_image_tokens=81)


def _model(processor: FlashSlothProcessor) -> FlashSlothForConditionalGeneration:
    """A model whose tower and language model share the work as in the full size: about 1 to 9."""
    config = FlashSlothConfig.tiny(
        vision_config={
            "hidden_size": 144,
            "intermediate_size": 538,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "image_size": 384,
        },
        text_config={
            "vocab_size": 4096,
            "hidden_size": 320,  # heads of 80, as in Phi-2
            "intermediate_size": 1280,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "max_position_embeddings": 3072,
        },
        query_layer=2,
        query_hidden_size=64,
        pooling_dropout=0.0,  # its draws would make the variants' losses differ
        num_query_tokens=processor.num_query_tokens,
        image_token_id=processor.image_token_id,
        query_token_id=processor.query_token_id,
        query_bias_token_id=processor.query_bias_token_id,
        eos_token_id=processor.eos_token_id,
        pad_token_id=processor.pad_token_id,
    )
    model = FlashSlothForConditionalGeneration(config).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(_FROZEN))
    return model
