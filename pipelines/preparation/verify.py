"""Is a dataset still what was written? Reads every byte of it again."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from pipelines import storage
from pipelines.shards.manifest import Manifest, QuarantineEntry, ShardEntry
from pipelines.shards.reader import ShardError, check

_THREADS = 4


def verify(folder: str) -> list[str]:
    """One line for each shard of the dataset in `folder` that is missing or not as the manifest says.

    Raises:
        ManifestError: `folder` holds no finished dataset.
    """
    manifest = Manifest.load(folder)

    def fault(entry: ShardEntry | QuarantineEntry) -> str | None:
        uri = storage.join(folder, entry.name)
        try:
            check(entry, uri, storage.read_bytes(uri))
        except FileNotFoundError:
            return f"{uri}: expected {entry.bytes} bytes with sha256 {entry.sha256}, found no such file"
        except ShardError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(_THREADS) as threads:
        return [line for line in threads.map(fault, [*manifest.shards, manifest.quarantine]) if line]
