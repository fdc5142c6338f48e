"""How much of a batch is padding, and how fast the feed is when nobody trains."""

from __future__ import annotations

import time

import numpy as np

from flashsloth import FlashSlothProcessor
from pipelines.benchmarks.conversations import draw_shapes
from pipelines.benchmarks.published import published_shares
from pipelines.benchmarks.rounds import Figures
from pipelines.benchmarks.table import Bound, Table
from pipelines.feed import BatchLoader, Feed, Position, PreparedRows, TokenBudget, deal
from pipelines.feed.sharing import padding_share

# The recipe `instruct`: 128 rows a step over 8 workers, 16 each.
_GLOBAL, _WORLD, _MICRO = 128, 8, 16
_BUDGET = TokenBudget(tokens=8192)
_PACKED = TokenBudget(tokens=8192, line=4096)


def measure_padding(num_rows: int, seed: int) -> tuple[Table, list[Bound], dict[str, float]]:
    """The share of padding of one epoch of rows with lengths like LLaVA-665k's, dealt out in several ways."""
    shapes = draw_shapes(num_rows, seed)
    lengths = np.array([shape.num_tokens(81, 9) for shape in shapes])
    has_image = np.array([shape.has_image for shape in shapes])

    def feed(length_group: int) -> list[np.ndarray]:
        return Feed(lengths, lengths, has_image, _GLOBAL, seed, length_group).epoch(0)

    def share(batches: list[np.ndarray], micro_batch: int | TokenBudget) -> float:
        dealt = [deal(batch, _WORLD, micro_batch, lengths, has_image) for batch in batches]
        return padding_share([share for steps in dealt for shares in steps for share in shares], lengths)

    grouped, random = feed(8), feed(1)
    published = [batch[rows] for batch in random for rows in published_shares(lengths[batch], _MICRO, _WORLD)]
    found = {
        "published sampler, 16 rows": padding_share([np.split(rows, len(rows)) for rows in published], lengths),
        "16 rows": share(random, _MICRO),
        "16 rows, length_group 8": share(grouped, _MICRO),
        "8192 tokens": share(random, _BUDGET),
        "8192 tokens, length_group 8": share(grouped, _BUDGET),
        "packed to 4096": share(random, _PACKED),
        "packed to 4096, length_group 8": share(grouped, _PACKED),
    }
    quantiles = ", ".join(f"{value:.0f}" for value in np.quantile(lengths, (0.05, 0.25, 0.5, 0.75, 0.95)))
    table = Table(
        title="Padding",
        columns=["micro-batches", "share of positions"],
        rows=[[name, f"{value:.1%}"] for name, value in found.items()],
        notes=[
            f"{num_rows:,} rows drawn like LLaVA-1.5's mix: mean {lengths.mean():.0f} tokens, quantiles 5/25/50/75/95 "
            f"% {quantiles}, {1 - has_image.mean():.1%} without an image. Row counts are published, token counts per "
            f"question and answer our estimates. {_GLOBAL} rows a step, {_WORLD} workers.",
        ],
    )
    bounds = [
        Bound(
            name="padding, packed, length_group 8",
            sense="at most",
            wanted=0.05,
            measured=found["packed to 4096, length_group 8"],
        ),
        Bound(name="padding, packed, random draw", sense="at most", wanted=0.05, measured=found["packed to 4096"]),
        Bound(
            name="padding, token budget, length_group 8",
            sense="at most",
            wanted=0.1,
            measured=found["8192 tokens, length_group 8"],
        ),
    ]
    return table, bounds, found


def feed_alone(
    rows: PreparedRows, processor: FlashSlothProcessor, global_batch: int, micro_batch: int | TokenBudget, threads: int
) -> Figures:
    """Samples per second of one epoch that nobody trains on: shards opened and hashed anew, pixels copied, padded."""
    feed = Feed(rows.num_tokens, rows.num_loss_tokens, rows.has_image, global_batch, seed=0)
    batches = feed.walk(Position(), feed.batches_per_epoch)
    start = time.perf_counter()
    with BatchLoader(
        rows,
        batches,
        rank=0,
        world_size=1,
        micro_batch=micro_batch,
        processor=processor,
        threads=threads,
    ) as loader:
        for _ in loader:
            pass
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "rows_per_s": len(rows) / seconds}
