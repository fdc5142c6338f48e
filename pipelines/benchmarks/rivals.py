"""The formats that other trainers read: MosaicML Streaming's MDS and WebDataset's tars, with the samples of a dataset.

    pip install --editable '.[bench]'
    pip install --no-deps mosaicml-streaming==0.13.0

Streaming is installed without its dependencies because it asks for transformers below 5 and numpy below 2.2, which
would undo this project's. Of it `streaming.base` alone is used: its top package imports torchvision as well.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.shards.reader import ShardedDataset

INSTALL = "pip install --editable '.[bench]' && pip install --no-deps mosaicml-streaming==0.13.0"
SHARD_BYTES = 2**26
"""Of both rivals; MDS's own default."""
_INTS = ("input_ids", "labels", "question_ids")
_TEXTS = ("key", "id", "source")


def is_installed(package: str) -> bool:
    """Whether `streaming` or `webdataset` can be imported."""
    return importlib.util.find_spec(package) is not None


def streaming() -> Any:
    """The module `streaming.base`, without what its top package imports."""
    if "streaming" not in sys.modules:
        spec = importlib.util.find_spec("streaming")
        if spec is None or spec.submodule_search_locations is None:
            raise ImportError(f"mosaicml-streaming is not installed: {INSTALL}")
        package = types.ModuleType("streaming")
        package.__spec__, package.__path__ = spec, list(spec.submodule_search_locations)
        sys.modules["streaming"] = package
    return importlib.import_module("streaming.base")


def write_mds(dataset: ShardedDataset, folder: Path) -> None:
    """Every sample of `dataset`, all of its columns, as MDS."""
    columns = {
        **dict.fromkeys(_TEXTS, "str"),
        **dict.fromkeys(("messages", "question_types"), "json"),
        **dict.fromkeys(_INTS, "ndarray:int32"),
        "pixel_values": "ndarray:uint8",
    }
    with streaming().MDSWriter(out=str(folder), columns=columns, size_limit=SHARD_BYTES) as writer:
        for sample in _samples(dataset):
            writer.write({name: sample[name] for name in columns})


def write_tars(dataset: ShardedDataset, folder: Path) -> list[str]:
    """Every sample of `dataset`, all of its columns, as WebDataset tars; returns their names."""
    import webdataset

    folder.mkdir(parents=True, exist_ok=True)
    pattern = str(folder / "part-%05d.tar")
    with webdataset.ShardWriter(pattern, maxsize=SHARD_BYTES, maxcount=10**9, verbose=0) as writer:
        for number, sample in enumerate(_samples(dataset)):
            texts = {name: sample[name] for name in (*_TEXTS, "messages", "question_types")}
            arrays = {f"{name}.npy": sample[name] for name in (*_INTS, "pixel_values")}
            writer.write({"__key__": f"{number:09d}", "text.json": json.dumps(texts).encode(), **arrays})
    return sorted(path.name for path in folder.glob("*.tar"))


def read_tars(urls: list[str]) -> Any:
    """The samples of WebDataset tars in their order, shared out among a DataLoader's workers by tar."""
    import webdataset

    return webdataset.WebDataset(urls, shardshuffle=False, empty_check=False).decode()


def _samples(dataset: ShardedDataset) -> Iterator[dict[str, Any]]:
    return (dataset.read(row) for row in range(len(dataset)))


def num_bytes(sample: dict[str, Any]) -> int:
    """The bytes of the arrays of a sample of any of the formats; looks at one value of each."""
    arrays = [value for value in sample.values() if isinstance(value, np.ndarray)]
    return sum(array.nbytes for array in arrays) + (0 * int(arrays[-1].flat[-1]) if arrays else 0)
