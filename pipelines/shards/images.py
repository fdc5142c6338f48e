"""Images that rows of a dataset share, each stored once, as an object of its own beside the shards.

An object is named by a hash of the image as received and of what decides what is made of it, so a worker can tell
without decoding whether it is there.
It holds an Arrow file of one row and, behind it, the sha256 of that file, so a reader can tell whether it is whole.
"""

from __future__ import annotations

import hashlib
import re
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa

from pipelines import storage
from pipelines.shards.integrity import REMEDY
from pipelines.shards.schema import IMAGE_SCHEMA

IMAGE_FOLDER = "images"
IMAGE_PATH = re.compile(rf"{IMAGE_FOLDER}/[0-9a-f]{{2}}/[0-9a-f]{{64}}\.arrow")
"""Path of a shared image below the dataset's folder. Whatever else lies there is not ours."""
_CHANGED_REMEDY = f"{REMEDY}, with the image if that is removed too"  # one that is there is never written again
_DIGEST_BYTES = 32
_THREADS = 16  # an object store answers in tens of milliseconds


class ImageObjectError(ValueError):
    """A shared image is not what was written; the message names it with what was expected and what is there."""


class ImageStore:
    """The shared images of the dataset in `folder`, a local path or any URI of fsspec."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def has(self, key: str) -> bool:
        """Whether an image is stored."""
        return storage.exists(self._uri(key))

    def total(self) -> tuple[int, int]:
        """Number of images that are stored, and their bytes."""
        file_system, root = storage.filesystem(self.folder)
        found = file_system.find(storage.join(root, IMAGE_FOLDER), detail=True)
        ours = {
            path: facts for path, facts in found.items() if IMAGE_PATH.fullmatch(path.removeprefix(root).lstrip("/"))
        }
        sizes = [facts["size"] for facts in ours.values()]
        return len(sizes), sum(sizes)

    def put(self, images: pa.Table) -> None:
        """Store each row of `images` (columns: IMAGE_SCHEMA) unless it is there: of two encodings the first stays."""
        rows = [images.slice(row, 1) for row in range(images.num_rows)]
        with ThreadPoolExecutor(_THREADS) as threads:
            list(threads.map(self._put, rows))

    def read(self, key: str) -> pa.RecordBatch:
        """The image `key`, one row with the columns of IMAGE_SCHEMA.

        Raises:
            ImageObjectError: it is missing, or not what was written.
        """
        uri = self._uri(key)
        try:
            data = memoryview(storage.read_bytes(uri))
        except FileNotFoundError as error:
            raise ImageObjectError(f"{uri}: expected a shared image, found no such file: {REMEDY}") from error
        body, expected = data[:-_DIGEST_BYTES], bytes(data[-_DIGEST_BYTES:])
        found = hashlib.sha256(body).digest()
        if found != expected:
            raise ImageObjectError(
                f"{uri}: expected sha256 {expected.hex()}, found {found.hex()}: the image was changed or cut after it "
                f"was written; {_CHANGED_REMEDY}"
            )
        row = pa.ipc.open_file(pa.py_buffer(body)).get_batch(0)
        if (other := row["image_key"][0].as_py()) != key:
            raise ImageObjectError(f"{uri}: expected the image {key}, found {other}: {_CHANGED_REMEDY}")
        return row

    def _put(self, row: pa.Table) -> None:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_file(sink, IMAGE_SCHEMA) as writer:
            writer.write_table(row)
        body = sink.getvalue().to_pybytes()
        storage.put_if_absent(self._uri(row["image_key"][0].as_py()), body + hashlib.sha256(body).digest())

    def _uri(self, key: str) -> str:
        return storage.join(self.folder, image_name(key))


def image_name(key: str) -> str:
    """Path of the image `key` below the dataset's folder; spread over folders, for no folder holds a million files."""
    return f"{IMAGE_FOLDER}/{key[:2]}/{key}.arrow"


def image_keys(shard: pa.RecordBatchFileReader) -> set[str]:
    """Keys of the shared images that the rows of `shard` name."""
    if "image_key" not in shard.schema.names:
        return set()  # written before images could be shared
    batches = (shard.get_batch(number) for number in range(shard.num_record_batches))
    return {key for batch in batches for key in batch["image_key"].to_pylist() if key}
