"""The data receipt: what a preparation took in, what became of it, and how long it took; JSON and a page to read.

Everything comes from the receipts of the chunks, so it is whole however often the preparation was killed. It is written
before the manifest and not part of it: it holds times.
"""

from __future__ import annotations

import base64
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from pydantic import BaseModel, ConfigDict

from pipelines import storage
from pipelines.preparation.facts import STEPS, id_hashes
from pipelines.preparation.plan import Plan
from pipelines.report.templates import page_template
from pipelines.shards.manifest import Manifest
from pipelines.shards.receipts import Example, QuarantinedRow, Receipt

RECEIPT_JSON, RECEIPT_PAGE = "receipt.json", "receipt.html"
_EXAMPLES_PER_REASON = 3
_MAX_BINS = 20


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceCounts(_Part):
    """What became of one source."""

    name: str
    path: str
    format: str
    planned: int
    written: int
    quarantined: int
    with_image: int
    tokens: int
    loss_tokens: int
    repeated_ids: int
    """Rows whose own id an earlier row of this source has too. They are kept: a row's key is its position. What a
    weight above 1 repeats is not counted."""


class Bin(_Part):
    """Values from `low` up to, not including, `high`."""

    low: int
    high: int
    count: int


class Reason(_Part):
    """Rows quarantined for one reason, and the first few of them."""

    reason: str
    count: int
    examples: list[QuarantinedRow]


class StepTime(_Part):
    """Time that all workers together spent on one step."""

    step: str
    seconds: float
    rows_per_second: float | None
    """Of one worker that does only this; null where no time was noted."""


class LastRun(_Part):
    """The run that finished the preparation; earlier ones may have done chunks before it."""

    rows: int
    seconds: float


class DataReceipt(_Part):
    """Everything the page shows."""

    planned: int
    written: int
    quarantined: int
    payload: str
    layout: str
    shard_bytes: int
    shared_images: int
    """Images that are stored once for all rows that name them; 0 where each row holds its own."""
    shared_image_bytes: int
    tokens: int
    loss_tokens: int
    sources: list[SourceCounts]
    token_lengths: list[Bin]
    image_sides: list[Bin]
    """Longer side in pixels, as received."""
    reasons: list[Reason]
    identities: dict[str, str]
    steps: list[StepTime]
    run: LastRun | None
    examples: list[Example]


def gather(
    plan: Plan, receipts: Sequence[Receipt], manifest: Manifest, run: LastRun | None, shared: tuple[int, int] = (0, 0)
) -> DataReceipt:
    """Add up `receipts`, one per chunk of `plan` and in its order.

    Args:
        plan: what was to be done.
        receipts: what was done.
        manifest: what came of it.
        run: what the last run did.
        shared: number of shared images and their bytes.
    """
    identities = {
        "manifest": manifest.identity(),
        "plan": manifest.plan,
        "processor": manifest.processor_identity,
        "encoder": manifest.encoder_identity or "none",
        "code": plan.terms.code,
    }
    lengths = Counter(length for shard in manifest.shards for length in shard.num_tokens)
    sides: Counter[int] = Counter()
    for receipt in receipts:
        sides.update(receipt.facts.image_sides)
    corpora = dict.fromkeys(source.corpus for source in plan.terms.sources)
    sources = [_source(plan, corpus, receipts) for corpus in corpora]
    return DataReceipt(
        planned=manifest.planned,
        written=manifest.written,
        quarantined=manifest.quarantined,
        payload=manifest.payload,
        layout=manifest.layout,
        shard_bytes=sum(shard.bytes for shard in manifest.shards),
        shared_images=shared[0],
        shared_image_bytes=shared[1],
        tokens=sum(source.tokens for source in sources),
        loss_tokens=sum(source.loss_tokens for source in sources),
        sources=sources,
        token_lengths=histogram(lengths),
        image_sides=histogram(sides),
        reasons=_reasons(row for receipt in receipts for row in receipt.quarantined),
        identities=identities,
        steps=_steps(receipts, manifest.planned),
        run=run,
        examples=[example for receipt in receipts for example in receipt.facts.examples],
    )


def histogram(counts: Counter[int]) -> list[Bin]:
    """Bins of one round width that cover all values, at most twenty."""
    if not counts:
        return []
    width = _round_width(max(counts) - min(counts) + 1)
    binned: Counter[int] = Counter()
    for value, count in counts.items():
        binned[value // width] += count
    return [
        Bin(low=index * width, high=(index + 1) * width, count=binned[index])
        for index in range(min(binned), max(binned) + 1)
    ]


def write_data_receipt(output: str, receipt: DataReceipt) -> None:
    """Write both forms of `receipt` into the folder `output`."""
    storage.write_bytes(storage.join(output, RECEIPT_JSON), receipt.model_dump_json(indent=1).encode())
    storage.write_bytes(storage.join(output, RECEIPT_PAGE), render(output, receipt).encode())


def render(output: str, receipt: DataReceipt) -> str:
    """The page as HTML. All that comes from a corpus is text and gets escaped."""
    thumbnails = [(example, base64.b64decode(example.thumbnail)) for example in receipt.examples]
    worked = sum(step.seconds for step in receipt.steps)
    template = page_template("receipt.html.jinja", "pipelines.preparation")
    return template.render(output=output, receipt=receipt, thumbnails=thumbnails, worked=worked)


def _source(plan: Plan, corpus: str, receipts: Sequence[Receipt]) -> SourceCounts:
    files = {number: source for number, source in enumerate(plan.terms.sources) if source.corpus == corpus}
    terms = next(iter(files.values()))
    own = [receipt for receipt in receipts if plan.chunks[receipt.chunk].source in files]
    shards = [receipt.shard for receipt in own if receipt.shard]
    first = [receipt for receipt in own if plan.chunks[receipt.chunk].repeat == 0]
    ids = np.concatenate([id_hashes(receipt.facts) for receipt in first] or [np.empty(0, np.uint64)])
    return SourceCounts(
        name=corpus,
        path=terms.path + (f" and {len(files) - 1:,} more files" if len(files) > 1 else ""),
        format=terms.format,
        planned=sum(receipt.planned for receipt in own),
        written=sum(receipt.written for receipt in own),
        quarantined=sum(len(receipt.quarantined) for receipt in own),
        with_image=sum(sum(shard.has_image) for shard in shards),
        tokens=sum(sum(shard.num_tokens) for shard in shards),
        loss_tokens=sum(sum(shard.num_loss_tokens) for shard in shards),
        repeated_ids=len(ids) - len(np.unique(ids)),
    )


def _reasons(rows: Iterable[QuarantinedRow]) -> list[Reason]:
    counts: Counter[str] = Counter()
    examples: defaultdict[str, list[QuarantinedRow]] = defaultdict(list)
    for row in rows:
        counts[row.reason] += 1
        if counts[row.reason] <= _EXAMPLES_PER_REASON:
            examples[row.reason].append(row)
    return [Reason(reason=name, count=count, examples=examples[name]) for name, count in counts.most_common()]


def _steps(receipts: Sequence[Receipt], rows: int) -> list[StepTime]:
    seconds = {step: sum(receipt.facts.seconds.get(step, 0.0) for receipt in receipts) for step in STEPS}
    return [
        StepTime(step=step, seconds=spent, rows_per_second=rows / spent if spent else None)
        for step, spent in seconds.items()
    ]


def _round_width(spread: int) -> int:
    """The smallest of 1, 2, 5, 10, 20, ... that covers `spread` in at most `_MAX_BINS` bins, wherever they begin."""
    scale = 1
    while True:
        for factor in (1, 2, 5):
            if factor * scale * (_MAX_BINS - 1) >= spread:
                return factor * scale
        scale *= 10
