"""Images -> pixels and tokens: by a bare loop, one such loop per core, a PyTorch DataLoader, and our preparation.

All make the same pixels and tokens of the same files: ours by its own functions, the others as one writes such a loop,
with Pillow. The bare loop is one process that does nothing else: it neither writes nor hashes, and appears once more
with our functions in it. The DataLoader appears twice: as it is, and with a receiver that writes and hashes. Nobody's
start-up is counted: processes and their imports are up before, and of a preparation the time of another one of a
handful of rows is taken off, in the same round.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from flashsloth import FlashSlothProcessor
from flashsloth.collation import collate
from flashsloth.image_processing_flashsloth import decode_image
from pipelines import storage
from pipelines.benchmarks.loader_files import write_batches
from pipelines.benchmarks.machine import num_cores
from pipelines.benchmarks.processes import CpuMeter, machine_cpu_s
from pipelines.benchmarks.rounds import Figures
from pipelines.corpora.llava import record
from pipelines.preparation.settings import PrepareSettings, SourceSettings
from pipelines.prepare import prepare
from pipelines.ray_session import start_ray

_BATCH = 32
_UPLOADS = 16  # at once


class Photos(Dataset[dict[str, Any]]):
    """The rows of a corpus, each made a sample when it is asked for, with Pillow.

    Args:
        corpus: the photos and the processor.
        rows: the corpus file.
        image_root: where the photos are read, if not in `corpus`: an s3:// folder, by s3fs.
    """

    def __init__(self, corpus: Path, rows: Path, image_root: str | None = None) -> None:
        self.image_root = image_root or str(corpus)
        self.records = [record(json.loads(line)) for line in rows.read_text(encoding="utf-8").splitlines()]
        self.processor = FlashSlothProcessor.from_pretrained(corpus / "processor")

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, row: int) -> dict[str, Any]:
        """Decode, resize, tokenize."""
        record = self.records[row]
        pixels = self.pixels(self._read(f"{self.image_root}/{record.image!s}"))
        return {**self.processor.encode(record.messages, has_image=True), "pixel_values": pixels}

    def _read(self, path: str) -> bytes:
        return fsspec.filesystem("s3").cat_file(path) if path.startswith("s3://") else Path(path).read_bytes()

    def pixels(self, data: bytes) -> np.ndarray:
        """A JPEG -> `uint8[1, 3, 384, 384]`."""
        size = self.processor.image_processor.size
        picture = Image.open(io.BytesIO(data)).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        # torch lays channels apart in a third of the time that numpy takes.
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1).contiguous().numpy()[None]


class CheckedPhotos(Photos):
    """The same by the functions of a preparation, which also look whether a file can be trusted."""

    def pixels(self, data: bytes) -> np.ndarray:
        """A JPEG -> `uint8[1, 3, 384, 384]`."""
        return self.processor.image_processor.to_uint8(decode_image(data))


def bare_loop(photos: Photos) -> Figures:
    """One process, one row after the other."""

    def work() -> None:
        for row in range(len(photos)):
            photos[row]

    with _one_thread():
        return _measured(len(photos), work)


class LoaderContestant:
    """PyTorch's DataLoader: batches of tensors in shared memory, by workers that live from round to round.

    Args:
        photos: the rows.
        num_workers: its processes.
        hands_over: False: its workers throw away what they have made and hand over a number in its place, so that they
            are bare loops beside each other: what the cores of this machine do together.
        folder: where this process writes what it is handed; None: it is thrown away.
    """

    def __init__(self, photos: Photos, num_workers: int, hands_over: bool = True, folder: Path | None = None) -> None:
        self._folder = folder
        self._num_rows = len(photos)
        pad = photos.processor.pad_token_id
        self._loader = DataLoader(
            photos,
            batch_size=_BATCH,
            num_workers=num_workers,
            persistent_workers=True,
            collate_fn=partial(collate, pad_token_id=pad) if hands_over else len,
        )
        next(iter(self._loader))

    def __call__(self) -> Figures:
        """All rows once."""

        def work() -> None:
            if self._folder:
                write_batches(self._loader, self._folder)
                return
            for _ in self._loader:
                pass

        self.drop()
        return _measured(self._num_rows, work)

    def drop(self) -> None:
        """Remove what the last run wrote."""
        if self._folder:
            remove(str(self._folder))


def start_warm_ray() -> None:
    """A Ray that keeps its workers from one preparation to the next, of which only the first waits for their imports.

    It would end those that are idle and more than there are CPUs.
    """
    os.environ["RAY_num_workers_soft_limit"] = str(2 * num_cores())  # noqa: SIM112 (Ray's own spelling)
    start_ray()


class PrepareContestant:
    """`jobs/prepare.py` on the cluster that this process is connected to, into a new folder below `output` each time.

    Args:
        corpus: the photos and the processor.
        rows: the corpus file.
        few: another with a handful of rows, whose preparation, in as many chunks, is all start-up.
        output: a local folder or a URI.
        share_images: as in the settings of a preparation.
        image_root: where the photos are read, if not in `corpus`; `upload_photos` brings them there.
    """

    def __init__(
        self,
        corpus: Path,
        rows: Path,
        few: Path,
        output: str,
        share_images: bool = False,
        image_root: str | None = None,
    ) -> None:
        self._corpus, self._rows, self._few, self._output = corpus, rows, few, output
        self._share_images = share_images
        self._image_root = image_root or str(corpus)
        self._runs = 0

    def warm_up(self, rows: Path) -> None:
        """Prepare the corpus file `rows`, so that every worker has its imports and has made chunks."""
        _quietly(self.settings(rows))
        remove(self.settings(rows).output)

    def settings(self, rows: Path) -> PrepareSettings:
        """How the corpus file `rows` is prepared in the run under way."""
        source = SourceSettings(path=str(rows), image_root=self._image_root)
        output = storage.join(self._output, f"{rows.stem}-{self._runs}")
        return PrepareSettings(
            sources=[source],
            output=output,
            processor=str(self._corpus / "processor"),
            share_images=self._share_images,
            chunk_rows=1 if rows == self._few else None,
        )

    def __call__(self) -> Figures:
        """A handful of rows, then all; the difference counts."""
        if self._runs:
            self.drop()
        self._runs += 1
        start_up = _measured(0, lambda: _quietly(self.settings(self._few)))
        whole = _measured(0, lambda: _quietly(self.settings(self._rows)))
        num_rows = sum(1 for _ in self._rows.open()) - sum(1 for _ in self._few.open())
        of_rows = {figure: value - start_up[figure] for figure, value in whole.items()}
        return _figures(num_rows, **of_rows) | {"start_up_s": start_up["seconds"]}

    def leave(self) -> str:
        """Prepare all rows, unmeasured; returns the folder or URI, which stays."""
        _quietly(self.settings(self._rows))
        return self.settings(self._rows).output

    def again(self) -> float:
        """Seconds of a second run over the finished corpus; it finds that nothing is left to do."""
        return _measured(0, lambda: _quietly(self.settings(self._rows)))["seconds"]

    def drop(self) -> None:
        """Remove what the last run wrote."""
        for rows in (self._few, self._rows):
            remove(self.settings(rows).output)


def upload_photos(corpus: Path, uri: str) -> None:
    """Put the photos of `corpus` below `uri`, under the names that its rows give them."""

    def put(photo: Path) -> None:
        storage.write_bytes(storage.join(uri, photo.relative_to(corpus).as_posix()), photo.read_bytes())

    with ThreadPoolExecutor(_UPLOADS) as threads:
        for _ in threads.map(put, sorted(corpus.glob("images/*.jpg"))):
            pass


def remove(uri: str) -> None:
    """Remove the folder `uri` and all in it, if there is one."""
    if storage.is_local(uri):
        shutil.rmtree(uri, ignore_errors=True)
        return
    file_system, path = storage.filesystem(uri)
    if file_system.exists(path):
        file_system.rm(path, recursive=True)


def _quietly(settings: PrepareSettings) -> None:
    with contextlib.redirect_stdout(io.StringIO()):
        prepare(settings)


def _measured(num_rows: int, work: Callable[[], None]) -> dict[str, float]:
    with CpuMeter() as meter:
        machine_s, start = machine_cpu_s(), time.perf_counter()
        work()
        seconds, machine_s = time.perf_counter() - start, machine_cpu_s() - machine_s
    return _figures(num_rows, seconds, meter.seconds, machine_s)


def _figures(num_rows: int, seconds: float, cpu_s: float, machine_cpu_s: float) -> dict[str, float]:
    rate = {"rows_per_s": num_rows / seconds, "cpu_ms_per_row": 1000 * cpu_s / num_rows} if num_rows else {}
    return {"seconds": seconds, "cpu_s": cpu_s, "machine_cpu_s": machine_cpu_s} | rate


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Neither torch nor the tokenizer may help themselves to the other cores."""
    threads, tokenizers = torch.get_num_threads(), os.environ.get("TOKENIZERS_PARALLELISM")
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        os.environ.pop("TOKENIZERS_PARALLELISM")
        if tokenizers is not None:
            os.environ["TOKENIZERS_PARALLELISM"] = tokenizers
