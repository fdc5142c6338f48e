"""One training step against the published forward: the same weights, the same rows, one change after the other.

Where the gain comes from, from the largest to the smallest (README has the figures):

- A line of packed samples is no wider than its samples, and each of them attends to itself alone, causally. Under
  transformers' mask a row of text costs the square of the longest row, upper half and padding included.
- Phi's activation in one kernel, where transformers has eight passes over the widest tensor there is.
- Logits only where there is a label; AdamW in one pass is within the noise at this size.
- Pooling and embedded query module without loops, and no zero images through the tower for text: a percent or two, with
  a tower of four layers on one core.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import mean

import numpy as np
import torch

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.collation import collate
from pipelines.benchmarks.bare_loop import model_ready
from pipelines.benchmarks.published import published_parts, published_shares, zero_image_pass
from pipelines.benchmarks.rounds import Figures, Rounds, take_turns
from pipelines.benchmarks.sizes import MID, TRAIN_PARTS
from pipelines.benchmarks.table import Bound, Table
from pipelines.feed import BatchLoader, Feed, GlobalBatch, Position, PreparedRows, TokenBudget, model_inputs
from pipelines.training.compilation import compile_layers
from pipelines.training.optimization import freeze
from pipelines.training.start import build_model

_WORLD = 8
_PUBLISHED, _OURS = "published", "ours"


@dataclass(frozen=True)
class Variant:
    """A way to compute the step: which parts run as published."""

    loop_pooling: bool = False
    loop_queries: bool = False
    zero_images: bool = False
    spelled_activation: bool = False
    all_logits: bool = False
    many_passes: bool = False
    """AdamW parameter by parameter and operation by operation."""
    padded: bool = False
    masked: bool = False
    """Attention over whole rows, with a mask."""


def _one_by_one() -> Iterator[Variant]:
    """From the published forward to ours, one change after the other."""
    left = {field.name: True for field in fields(Variant)}
    yield Variant(**left)
    for name in list(left):
        del left[name]
        yield Variant(**left)


# The changes in the order of the fields of `Variant`.
_CHANGES = (
    _PUBLISHED,
    "+ pooling in one reshape",
    "+ EmbQ grouped by image",
    "+ no zero images for text",
    "+ activation in one kernel",
    "+ logits where there is a label",
    "+ AdamW in one pass",
    "+ packed",
    _OURS,  # + attention sample by sample
)
VARIANTS = dict(zip(_CHANGES, _one_by_one(), strict=True))


class StepBench:
    """Model, data and batches; every variant trains a copy of one model on the same rows.

    Args:
        work: Folder for processor and data.
        num_rows: Rows to draw.
        micro_size: Rows of a step.
        seed: Of lengths, words, pixels and weights.
    """

    def __init__(self, work: Path, num_rows: int, micro_size: int, seed: int) -> None:
        self.micro_size = micro_size
        self._seed = seed
        self.processor, folder = MID.write(work, num_rows, seed)
        self.rows = PreparedRows([folder])
        self.batches = {
            "image rows": self._published_batch(self.rows.has_image),
            "text rows": self._published_batch(~self.rows.has_image),
        }
        self.model = build_model(MID.model(work), self.processor, "fp32", seed)
        freeze(self.model, TRAIN_PARTS)

    def _published_batch(self, wanted: np.ndarray) -> np.ndarray:
        """Row numbers of one rank's share of a global batch, as the published sampler deals it out."""
        chosen = np.flatnonzero(wanted)[: self.micro_size * _WORLD]
        shares = published_shares(self.rows.num_tokens[chosen], self.micro_size, _WORLD)
        return chosen[shares[0]]

    def measure(self, kind: str, rounds: int) -> Rounds:
        """Every variant's step on the batch `kind`, in turns."""
        steps = {name: self.stepper(variant, self.batches[kind]) for name, variant in VARIANTS.items()}
        # Warms up and makes the optimizer's state. The variants must compute the same, or their times compare nothing.
        losses = {name: step()["loss"] for name, step in steps.items()}
        if max(losses.values()) - min(losses.values()) > 1e-4:
            raise ValueError(f"the variants' losses on {kind} differ by more than 1e-4: {losses}")
        return take_turns(steps, rounds, say=lambda line: print(f"{kind}: {line}", flush=True))

    def stepper(self, variant: Variant, rows: np.ndarray, compiled: bool = False) -> Callable[[], Figures]:
        """A copy of the model, and what trains it on `rows` once more each time it is called."""
        model = copy.deepcopy(self.model)
        if compiled:
            compile_layers(model)
        learning = [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=1e-5, fused=not variant.many_passes)
        prepared = list(self._inputs(variant, rows))
        as_published = variant.loop_pooling, variant.loop_queries, variant.spelled_activation, variant.masked

        def step() -> Figures:
            start, cpu_start = time.perf_counter(), time.process_time()
            loss = 0.0
            with published_parts(model, *as_published):
                for inputs, loss_tokens in prepared:
                    loss += _backward(model, inputs, loss_tokens, variant)
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

    def waiting_share(self, num_steps: int) -> float:
        """The share of a run's time that its steps wait for the feed, reading and training at once."""
        feed = Feed(
            self.rows.num_tokens,
            self.rows.num_loss_tokens,
            self.rows.has_image,
            self.micro_size,
            self._seed,
        )
        model = copy.deepcopy(self.model)
        learning = [each for each in model.parameters() if each.requires_grad]
        optimizer = torch.optim.AdamW(learning, lr=1e-5, fused=True)
        start = time.perf_counter()
        with self._loader(list(feed.walk(Position(), num_steps))) as loader:
            for micro in loader:
                _backward(model, micro.inputs, micro.loss_tokens, Variant())
                if micro.is_last:
                    optimizer.step()
                    optimizer.zero_grad()
            return loader.waited_s / (time.perf_counter() - start)


def _backward(
    model: FlashSlothForConditionalGeneration,
    inputs: dict[str, torch.Tensor],
    loss_tokens: float,
    variant: Variant,
) -> float:
    ready = model_ready(inputs)
    pixels = ready["pixel_values"]
    if variant.zero_images and not len(pixels):
        del ready["pixel_values"]  # with it, our forward would send one image of zeros through the small parts
    if variant.all_logits:
        labels = ready.pop("labels")
        logits = model(**ready, use_cache=False).logits
        vocabulary = model.config.text_config.vocab_size
        loss = model.loss_function(logits, labels, vocab_size=vocabulary, num_items_in_batch=loss_tokens)
    else:
        loss = model(**ready, num_items_in_batch=loss_tokens, use_cache=False).loss
    if variant.zero_images and (without := len(inputs["input_ids"]) - len(pixels)):
        loss = loss + zero_image_pass(model, pixels, without)
    loss.backward()
    return loss.item()


def compare_steps(bench: StepBench, rounds: dict[str, Rounds]) -> tuple[Table, Bound, float]:
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
    config = bench.model.config
    table = Table(
        title="One training step (forward, backward, AdamW; tower frozen)",
        columns=["variant", *(f"{kind}, s" for kind in rounds), *(f"{kind}, gain" for kind in rounds), "epoch, gain"],
        rows=cells,
        notes=[
            f"{bench.micro_size} rows a step, one rank's share of a batch as the published sampler deals it; "
            f"language model {config.text_config.num_hidden_layers} layers of {config.text_config.hidden_size}, tower "
            f"{config.vision_config.num_hidden_layers} of {config.vision_config.hidden_size} over 729 patches; fp32. "
            f"The last row adds attention sample by sample. 'epoch' weighs the two kinds as the mix does.",
        ],
    )
    bound = Bound(
        name="training step against the published forward",
        sense="at least",
        wanted=1.5,
        measured=float(np.median(gains[_OURS])),
    )
    return table, bound, 1 / mean(blended(_OURS))
