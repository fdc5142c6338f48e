"""What decides a row beside its corpus and the settings: our own code, and the libraries that make ids and pixels."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from pipelines import storage

# Each decides what a row or an image becomes, or the bytes of a shard. All formats of `corpora` belong to them.
_OF_PIPELINES = (
    *("records.py", "encode.py"),
    *(f"preparation/{name}.py" for name in ("chain", "chunks", "features", "row_images", "samples", "sources")),
    *(f"shards/{name}.py" for name in ("images", "quantization", "schema", "writer")),
)
_OF_MODEL = (
    *("configuration_flashsloth.py", "conversation.py", "processing_flashsloth.py", "vision.py"),
    *("image_faults.py", "image_modes.py", "image_processing_flashsloth.py", "image_structure.py"),
    "resampling.py",
)
_LIBRARIES = ("pillow", "tokenizers")
_LIBRARIES_OF_TOWER = ("torch", "transformers")


def code_files() -> list[Path]:
    """Our own files that decide a row, in a fixed order."""
    pipelines = Path(__file__).parents[1]
    formats = sorted((pipelines / "corpora").glob("*.py"))
    return [*formats, *(pipelines / name for name in _OF_PIPELINES), *(_model_folder() / name for name in _OF_MODEL)]


def code_identity() -> str:
    """The sha256 of `code_files`."""
    return storage.sha256(b"".join(file.read_bytes() for file in code_files()))


def library_versions(has_tower: bool) -> dict[str, str]:
    """Name -> version of the libraries whose next version may give other ids or pixels; with a tower, features."""
    names = (*_LIBRARIES, *(_LIBRARIES_OF_TOWER if has_tower else ()))
    return {name: version(name) for name in names}


def _model_folder() -> Path:
    # Not imported: that would be to import torch, seconds of a driver or a task that needs nothing of it.
    spec = find_spec("flashsloth")
    assert spec is not None and spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0])
