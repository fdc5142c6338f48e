"""Images -> pixels and tokens in three ways: a bare loop, a PyTorch DataLoader, and the preparation of this project.

All three run the same functions on the same files. The bare loop is one process that does nothing else: it neither
writes nor hashes. Every contestant's start-up (processes, imports, a first look at the files) is left out.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from flashsloth import FlashSlothProcessor
from flashsloth.collation import collate
from flashsloth.image_processing_flashsloth import decode_image
from pipelines.benchmarks.rounds import Figures
from pipelines.corpora.llava import record

_BATCH = 32


class Photos(Dataset[dict[str, Any]]):
    """The rows of a corpus, each made a sample when it is asked for."""

    def __init__(self, corpus: Path, rows: Path) -> None:
        self.corpus = corpus
        self.records = [record(json.loads(line)) for line in rows.read_text(encoding="utf-8").splitlines()]
        self.processor = FlashSlothProcessor.from_pretrained(corpus / "processor")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Decode, resize, tokenize."""
        record = self.records[row]
        image = decode_image((self.corpus / str(record.image)).read_bytes())
        pixels = self.processor.image_processor.to_uint8(image)
        return {**self.processor.encode(record.messages, has_image=True), "pixel_values": pixels}


def bare_loop(corpus: Path, rows: Path) -> Figures:
    """One process, one row after the other."""
    photos = Photos(corpus, rows)
    photos[0]
    return _rate(photos, lambda: [photos[row] and None for row in range(len(photos))])


def data_loader(corpus: Path, rows: Path, num_workers: int) -> Figures:
    """PyTorch's DataLoader, batches of tensors in shared memory."""
    photos = Photos(corpus, rows)
    loader = DataLoader(
        photos,
        batch_size=_BATCH,
        num_workers=num_workers,
        persistent_workers=True,
        collate_fn=lambda samples: collate(samples, photos.processor.pad_token_id),
    )
    return _rate(photos, lambda: [None for _ in loader])


def _rate(photos: Photos, work: Any) -> Figures:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.perf_counter()
        work()
        seconds = time.perf_counter() - start
    finally:
        torch.set_num_threads(threads)
    return {"seconds": seconds, "rows_per_s": len(photos) / seconds}
