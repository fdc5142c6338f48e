"""Rows of a prepared folder as a person reads them: the conversation, what the model is given, and what it learns."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import groupby, takewhile
from typing import Any

import pyarrow.parquet as pq
import yaml

from flashsloth import FlashSlothProcessor
from flashsloth.image_processing_flashsloth import WITH_GIF, decode_image
from pipelines import storage
from pipelines.preparation.plan import MISSING_PLAN, PLAN_NAME, Plan, load_plan
from pipelines.preparation.processor import load_processor
from pipelines.preparation.settings import CONFIG_NAME, PrepareSettings
from pipelines.preparation.sources import PlanError
from pipelines.shards.integrity import check, missing
from pipelines.shards.manifest import Manifest
from pipelines.shards.reader import ShardedDataset
from pipelines.shards.receipts import QuarantinedRow, Receipt, load_receipt, receipt_uris
from pipelines.shards.schema import IGNORED_LABEL


class InspectionError(ValueError):
    """There is no such row."""


class Inspector:
    """Shows rows of the finished dataset in `folder`.

    Attributes:
        note: why token ids are not shown as text; empty where they are.

    Raises:
        ManifestError: `folder` holds no finished dataset.
    """

    def __init__(self, folder: str) -> None:
        self.folder = storage.resolve(folder)
        self.manifest = Manifest.load(self.folder)
        self.processor, self.note = _processor(self.folder, self.manifest)

    def rows(self, count: int) -> Iterator[str]:
        """The first `count` rows, as text."""
        dataset = ShardedDataset(self.folder)
        return (self._written(dataset.read(index)) for index in range(min(count, len(dataset))))

    def row(self, key: str) -> str:
        """The row with this key, written or quarantined, as text.

        Raises:
            InspectionError: the plan has no row with this key, or is missing.
            StoredModelError: the plan, or the row's receipt, is damaged; or the receipt is missing.
        """
        plan = load_plan(self.folder)
        if plan is None:
            raise InspectionError(
                f"{self.folder}: no {PLAN_NAME} here, which says where the row of a key lies: {MISSING_PLAN}"
            )
        number, position = _chunk_of(plan, key)
        if number is None:
            raise InspectionError(f"{self.folder}: no row has the key {key!r}; a key is a source's name and a position")
        receipt = load_receipt(Receipt, receipt_uris(self.folder, len(plan.chunks))[number])
        rejected = {row.key: row for row in receipt.quarantined}
        if key in rejected:
            return _quarantined(rejected[key])
        before = plan.keys(plan.chunks[number])[:position]
        offset = sum(1 for each in before if each not in rejected)
        first = sum(shard.rows for shard in takewhile(lambda shard: shard != receipt.shard, self.manifest.shards))
        return self._written(ShardedDataset(self.folder).read(first + offset))

    def quarantined(self) -> Iterator[str]:
        """Every quarantined row, as text.

        Raises:
            ShardError: the table is missing, or not the one that was written.
        """
        entry = self.manifest.quarantine
        uri = storage.join(self.folder, entry.name)
        try:
            data = storage.read_bytes(uri)
        except FileNotFoundError as error:
            raise missing(entry, uri) from error
        check(entry, uri, data)
        for row in pq.read_table(io.BytesIO(data)).to_pylist():
            yield _quarantined(QuarantinedRow(**row))

    def _written(self, row: dict[str, Any]) -> str:
        learned = int((row["labels"] != IGNORED_LABEL).sum())
        types = iter(row["question_types"])
        lines = [
            f"{row['key']}  (id {row['id'] or 'none'}, source {row['source']})",
            f"  image   {_image(row)}",
            f"  tokens  {len(row['input_ids'])}, of which {learned} are learned",
        ]
        for message in row["messages"]:
            kind = next(types, "") if message["role"] == "user" else ""
            content = message["content"].replace("\n", "\n" + " " * 12)
            lines.append(f"  {message['role']:<9} {content}" + (f"  [{kind}]" if kind else ""))
        if self.processor:
            ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
            lines.append(f"  given   {fold(self.processor, ids)}")
            lines.append(f"  learned {_learned(self.processor, ids, labels)}")
        return "\n".join(lines)


def fold(processor: FlashSlothProcessor, ids: list[int]) -> str:
    """Token ids as text, a run of one placeholder as `<image>x81`; line ends are shown as \\n."""
    placeholders = {processor.image_token_id, processor.query_token_id}
    parts = []
    for token, run in groupby(ids, lambda each: each if each in placeholders else None):
        part = list(run)
        text = processor.tokenizer.decode(part[:1] if token is not None else part)
        parts.append(f"{text}x{len(part)}" if token is not None else text)
    return "".join(parts).replace("\n", "\\n")


def _learned(processor: FlashSlothProcessor, ids: list[int], labels: list[int]) -> str:
    runs = groupby(zip(ids, labels, strict=True), lambda pair: pair[1] != IGNORED_LABEL)
    return " … ".join(fold(processor, [token for token, _ in run]) for is_learned, run in runs if is_learned)


def _image(row: dict[str, Any]) -> str:
    if "image_bytes" in row:
        width, height = decode_image(row["image_bytes"], formats=WITH_GIF).size
        return f"{width} x {height} pixels, {len(row['image_bytes']):,} bytes as received"
    for name, kind in (("pixel_values", "pixels"), ("patch_features", "features")):
        if name in row:
            array = row[name]
            return f"{kind} {array.dtype}{list(array.shape)}, {array.nbytes:,} bytes"
    return "none"


def _quarantined(row: QuarantinedRow) -> str:
    return f"{row.key}  (id {row.id or 'none'}, source {row.source})\n  at {row.location}\n  {row.reason}: {row.detail}"


def _chunk_of(plan: Plan, key: str) -> tuple[int | None, int]:
    """Number of the chunk that has the row `key`, and the row's place in it."""
    name, _, place = key.rpartition(":")
    digits, _, repeat = place.partition("+")
    if not all(part.isascii() and part.isdigit() for part in (digits, repeat or "0")):
        return None, 0
    nearest = None
    for number, chunk in enumerate(plan.chunks):
        same = plan.terms.sources[chunk.source].name == name and chunk.repeat == int(repeat or "0")
        if same and chunk.first_row <= int(digits):
            nearest = number
    keys = [] if nearest is None else plan.keys(plan.chunks[nearest])
    return (nearest, keys.index(key)) if key in keys else (None, 0)


def _processor(folder: str, manifest: Manifest) -> tuple[FlashSlothProcessor | None, str]:
    """The processor that the dataset was prepared with, if it still is where its settings say."""
    uri = storage.join(folder, CONFIG_NAME)
    try:
        text = storage.read_bytes(uri)
    except FileNotFoundError:
        return None, f"no {CONFIG_NAME} here, so token ids are not shown as text"
    try:
        settings = PrepareSettings(**yaml.safe_load(text))
    except (yaml.YAMLError, TypeError, ValueError):  # cut off, no mapping, or not of these fields
        return None, f"token ids are not shown as text: {uri} is damaged, or of another version; restore it"
    try:
        processor = load_processor(settings)
    except PlanError as error:
        return None, f"token ids are not shown as text: {str(error).splitlines()[0]}"
    if processor.identity() != manifest.processor_identity:
        return None, "token ids are not shown as text: the processor has changed since"
    return processor, ""
