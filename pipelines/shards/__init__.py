"""Shards: Arrow files named by their content, and the manifest that makes them a dataset."""

from pipelines.shards.integrity import ShardError
from pipelines.shards.manifest import Manifest, ManifestError, ShardEntry
from pipelines.shards.reader import ShardedDataset

__all__ = ["Manifest", "ManifestError", "ShardEntry", "ShardError", "ShardedDataset"]
