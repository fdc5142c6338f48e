"""A prepared dataset as a sequence: open the manifest, read any row by its number, from a local folder or from S3.

A local shard is read in its place: its size, head and foot are checked when a process first opens it, and a row against
its checksum whenever it is read. Shards of an object store are fetched whole into a cache folder while they fit into
its bound, since training comes back to them: the next ones while one is read. All of a shard is checked then, before
anybody sees it. Of all others each row is read by a ranged GET and checked alone: a cache that is smaller than what is
shuffled through it would fetch whole shards for single rows.

A row is read into memory of its own, where the arrays that are handed out stay: to map a file costs more, a hundred
pages a row, than to copy a row out of the page cache.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections import OrderedDict
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import WeakSet

import numpy as np
import pyarrow as pa
import xxhash

from pipelines import storage
from pipelines.shards.cache import ShardCache
from pipelines.shards.images import ImageStore
from pipelines.shards.integrity import (
    CHANGED,
    ShardError,
    check,
    check_rows,
    check_size,
    damage,
    frame,
    is_framed,
    is_intact,
    missing,
)
from pipelines.shards.manifest import Manifest, ShardEntry
from pipelines.shards.prefetch import AHEAD, Prefetcher, RemoteShard
from pipelines.shards.quantization import dequantize
from pipelines.shards.schema import SAMPLE_SCHEMA

# Each open shard holds a file descriptor, of which a process commonly has 1024.
_MAX_OPEN_SHARDS = 64
_ARRAY_FIELDS = {"pixels": "pixel_values", "features": "patch_features"}
_UNPICKLED = ("_lock", "_open", "_checked", "_prefetcher")


_DATASETS: WeakSet[ShardedDataset] = WeakSet()


def _begin_anew() -> None:
    """In a process that was just forked: a lock that a thread of its parent held would stay locked for ever."""
    for dataset in list(_DATASETS):
        dataset._forget()


os.register_at_fork(after_in_child=_begin_anew)

_OwnRow = tuple[pa.RecordBatch, np.ndarray | None]
"""A row, and the memory that it lies in and that belongs to nobody else; None where there is none."""


class ShardedDataset:
    """The samples of a prepared folder, in a fixed order.

    Threads may read at once. A pickled copy, and that of a process that was forked, opens its own files.

    Args:
        folder: where `jobs/prepare.py` wrote; a local path or any URI of fsspec.
        cache_dir: where shards of an object store are kept; see ShardCache.
        cache_bytes: the size of that cache; 0 for none.

    Attributes:
        num_tokens: int64[N], length of `input_ids`.
        num_loss_tokens: int64[N], labels that count.
        has_image: bool[N].

    Raises:
        ManifestError: `folder` holds no finished dataset.
    """

    def __init__(self, folder: str, cache_dir: str | None = None, cache_bytes: int = 64 * 2**30) -> None:
        self.folder = storage.resolve(str(folder))
        self.manifest = Manifest.load(self.folder)
        self.cache = ShardCache(cache_dir, cache_bytes)
        self.images = ImageStore(self.folder)
        self._is_local = storage.is_local(self.folder)
        self._may_share = "image_key" in self.manifest.arrow_schema  # datasets from before have no such column
        shards = self.manifest.shards
        self._stops = np.cumsum([shard.rows for shard in shards], dtype=np.int64).tolist()
        self.keep_within(cache_bytes)
        self.num_tokens = np.array([n for shard in shards for n in shard.num_tokens], dtype=np.int64)
        self.num_loss_tokens = np.array([n for shard in shards for n in shard.num_loss_tokens], dtype=np.int64)
        self.has_image = np.array([has for shard in shards for has in shard.has_image], dtype=bool)
        self._forget()

    def __len__(self) -> int:
        return self._stops[-1] if self._stops else 0

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _UNPICKLED}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def keep_within(self, cache_bytes: int) -> int:
        """Keep whole shards only as far as they fit into `cache_bytes`; returns the bytes that they will take.

        The cache itself stays as large as it is: several datasets can so share one.
        """
        shards = self.manifest.shards
        ends = np.cumsum([shard.bytes for shard in shards], dtype=np.int64)
        self._num_mapped = len(shards) if self._is_local else int((ends <= cache_bytes).sum())
        return 0 if self._is_local or not self._num_mapped else int(ends[self._num_mapped - 1])

    def read(self, index: int) -> dict[str, Any]:
        """Row `index` of the dataset.

        Returns:
            key, id, source: str. messages: list of {role, content}. question_types: list of str, one per user turn or
            none. input_ids, labels, question_ids: int32[S]. And, where the row has an image, by the dataset's payload:
            pixel_values: uint8[T, 3, H, W]; patch_features: float16[T, P, D], also where 8 bits are stored;
            image_bytes: bytes, as received. The arrays are the caller's own.

        Raises:
            IndexError: no such row.
            ShardError: the shard is missing or is not the one that was written.
            ImageObjectError: the same of an image that is stored apart.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {self.folder}, which has {len(self)} rows")
        number = bisect_right(self._stops, index)
        first = self._stops[number - 1] if number else 0
        entry = self.manifest.shards[number]
        by_range = number >= self._num_mapped and entry.row_offsets is not None
        row, memory = self._fetch_row(entry, index - first) if by_range else self._shard(number).row(index - first)
        sample = {name: row[name][0].as_py() for name in ("key", "id", "source", "messages", "question_types")}
        for name in ("input_ids", "labels", "question_ids"):
            sample[name] = row[name].values.to_numpy().copy()
        key = row["image_key"][0].as_py() if self._may_share else None
        row, memory = (self.images.read(key), None) if key else (row, memory)
        image = _image(row, memory)
        if image is not None:
            field = _ARRAY_FIELDS.get(self.manifest.payload)
            sample[field or "image_bytes"] = _array(row, image) if field else image.tobytes()
        return sample

    def _fetch_row(self, entry: ShardEntry, position: int) -> _OwnRow:
        uri = storage.join(self.folder, entry.name)
        start, stop = (entry.row_offsets or [])[position : position + 2]
        try:
            data = storage.read_range(uri, start, stop)
        except FileNotFoundError as error:
            raise missing(entry, uri) from error
        if not is_intact(entry, position, data):
            expected, found = (entry.row_checksums or [])[position], xxhash.xxh3_64_hexdigest(data)
            raise ShardError(
                f"{uri}: row {position}: expected {stop - start} bytes with XXH3 {expected}, found {len(data)} with "
                f"{found}: {CHANGED}"
            )
        return _row(np.frombuffer(bytearray(data), np.uint8))

    def _forget(self) -> None:
        self._lock = Lock()
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._checked: set[int] = set()
        self._prefetcher = Prefetcher(self.cache)
        _DATASETS.add(self)

    def _cached(self, number: int) -> str:
        following = range(number + 1, min(number + 1 + AHEAD, self._num_mapped))
        return str(self._prefetcher.get(self._remote(number), [self._remote(later) for later in following]))

    def _remote(self, number: int) -> RemoteShard:
        entry = self.manifest.shards[number]
        return RemoteShard(entry.sha256, entry.bytes, partial(_fetch, entry, storage.join(self.folder, entry.name)))

    def _shard(self, number: int) -> _OpenShard:
        with self._lock:
            if number not in self._open:
                self._open[number] = _OpenShard(self, number)
            self._open.move_to_end(number)
            if len(self._open) > _MAX_OPEN_SHARDS:
                self._open.popitem(last=False)
            return self._open[number]


class _OpenShard:
    """One shard, opened and checked by the first thread that reads a row of it while others read other shards."""

    def __init__(self, dataset: ShardedDataset, number: int) -> None:
        self._dataset = dataset
        self._number = number
        self._lock = Lock()
        self._file: pa.RecordBatchFileReader | None = None  # of a manifest that does not know where rows lie
        self._descriptor: int | None = None

    def __del__(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)

    def row(self, position: int) -> _OwnRow:
        """Row `position` of the shard."""
        entry = self._dataset.manifest.shards[self._number]
        if entry.row_offsets is None:
            with self._lock:
                if self._file is None:
                    self._file = pa.ipc.open_file(self._map(entry))
                return self._file.get_batch(position), None
        with self._lock:
            if self._descriptor is None:
                self._descriptor = self._open(entry)
        start, stop = entry.row_offsets[position : position + 2]
        memory = np.empty(stop - start, np.uint8)
        os.preadv(self._descriptor, [memory.data], start)
        if not is_intact(entry, position, memory.data):
            raise damage(entry, self._uri(entry), f"row {position}", Path(self._path(entry)).read_bytes())
        return _row(memory)

    def _uri(self, entry: ShardEntry) -> str:
        return storage.join(self._dataset.folder, entry.name)

    def _path(self, entry: ShardEntry) -> str:
        path = self._uri(entry) if self._dataset._is_local else self._dataset._cached(self._number)
        if not os.path.exists(path):
            raise missing(entry, self._uri(entry))
        return path

    def _open(self, entry: ShardEntry) -> int:
        path = Path(self._path(entry))
        check_size(entry, self._uri(entry), path)
        descriptor = os.open(path, os.O_RDONLY)
        try:
            self._check_frame(entry, path, descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _check_frame(self, entry: ShardEntry, path: Path, descriptor: int) -> None:
        if self._number in self._dataset._checked:
            return
        head, foot = (memoryview(os.pread(descriptor, len(part), part.start)) for part in frame(entry))
        if not is_framed(entry, head, foot):
            raise damage(entry, self._uri(entry), "its head or foot", path.read_bytes())
        self._dataset._checked.add(self._number)

    def _map(self, entry: ShardEntry) -> pa.MemoryMappedFile:
        source = pa.memory_map(self._path(entry))
        if self._number not in self._dataset._checked:
            check(entry, self._uri(entry), source.read_buffer())
            self._dataset._checked.add(self._number)
        return source


def _fetch(entry: ShardEntry, uri: str, path: Path) -> None:
    try:
        storage.download(uri, path)
    except FileNotFoundError as error:
        raise missing(entry, uri) from error
    check_size(entry, uri, path)  # before it is mapped: an empty file cannot be
    with pa.memory_map(str(path)) as source:
        check_rows(entry, uri, source.read_buffer())


def _row(memory: np.ndarray) -> _OwnRow:
    return pa.ipc.read_record_batch(pa.ipc.read_message(pa.py_buffer(memory)), SAMPLE_SCHEMA), memory


def _image(row: pa.RecordBatch, memory: np.ndarray | None) -> np.ndarray | None:
    """uint8[N] of the row's image: the part of `memory` that holds it, or a copy where the row lies elsewhere."""
    column = row["image"]
    if column.null_count:
        return None
    _, offsets, data = column.buffers()
    start, stop = np.frombuffer(offsets, np.int64)[column.offset : column.offset + 2].tolist()
    if memory is None:
        return np.frombuffer(data, np.uint8)[start:stop].copy()
    begin = data.address - memory.ctypes.data
    return memory[begin + start : begin + stop]


def _array(row: pa.RecordBatch, image: np.ndarray) -> np.ndarray:
    shape, dtype = row["image_shape"][0].as_py(), row["image_dtype"][0].as_py()
    array = image.view(dtype).reshape(shape)
    if dtype == "int8":
        return dequantize(array, np.frombuffer(row["image_scales"][0].as_buffer(), np.float16).reshape(shape[:-1]))
    return array
