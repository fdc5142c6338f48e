"""Released checkpoints <-> ours: one table of names, applied to the tensors of safetensors files bit for bit."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer

from .configuration_flashsloth import FlashSlothConfig
from .image_processing_flashsloth import FlashSlothImageProcessor
from .modeling_flashsloth import FlashSlothForConditionalGeneration
from .processing_flashsloth import FlashSlothProcessor
from .released_format import (
    UNREAD,
    ConversionError,
    config_from_released,
    config_to_released,
    our_name,
    released_name,
)

__all__ = ["ConversionError", "from_released", "to_released"]


def from_released(reference: Path, out: Path) -> list[str]:
    """Write the released checkpoint in `reference` as a `from_pretrained` folder `out`.

    Tensors keep their dtype and bits. Returns the names that were dropped because no forward reads them.

    Raises:
        ConversionError: files, keys or shapes are missing, unknown or wrong; `out` is not empty.
    """
    config = config_from_released(_read_json(reference / "config.json"))
    dropped: list[str] = []

    def rename(name: str) -> str | None:
        if UNREAD.search(name):
            dropped.append(name)
            return None
        return our_name(name, config) or f"?{name}"

    with _NewFolder(out) as folder:
        config.architectures = [FlashSlothForConditionalGeneration.__name__]
        shapes = _rewrite(reference, folder, rename)
        _check(shapes, {k: tuple(v.shape) for k, v in _empty_model(config).state_dict().items()}, reference)
        config.dtype = _common_dtype(folder)
        config.save_pretrained(folder)
        _empty_model(config).generation_config.save_pretrained(folder)
        if (reference / "tokenizer_config.json").exists():
            _processor(reference, config).save_pretrained(folder)
        _list_files(folder)
    return dropped


def to_released(checkpoint: Path, out: Path) -> None:
    """Write our checkpoint folder in the released naming to `out`; tensors keep their dtype and bits.

    Raises:
        ConversionError: as in `from_released`.
    """
    settings = _read_json(checkpoint / "config.json")
    if settings.get("model_type") != FlashSlothConfig.model_type or "text_config" not in settings:
        raise ConversionError(f"{checkpoint}: config.json is not one that this library saved (no text_config)")
    config = FlashSlothConfig(**settings)
    with _NewFolder(out) as folder:
        shapes = _rewrite(checkpoint, folder, lambda name: released_name(name, config) or f"?{name}")
        expected = {released_name(k, config) or k: tuple(v.shape) for k, v in _empty_model(config).state_dict().items()}
        _check(shapes, expected, checkpoint)
        text = json.dumps(config_to_released(config), indent=2, sort_keys=True)
        (folder / "config.json").write_text(text + "\n", encoding="utf-8")
        if (checkpoint / "tokenizer_config.json").exists():
            AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)


def _empty_model(config: FlashSlothConfig) -> FlashSlothForConditionalGeneration:
    with torch.device("meta"):
        return FlashSlothForConditionalGeneration(config)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConversionError(f"{path} is missing: give the folder of a checkpoint") from None
    except ValueError as error:
        raise ConversionError(f"{path} is no valid JSON: {error}") from None


def _weight_files(folder: Path) -> list[Path]:
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(_read_json(index)["weight_map"].values()))
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ConversionError(f"{index} names files that are not there: {', '.join(missing)}")
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ConversionError(f"{folder} holds no .safetensors file (pickled weights are not read: convert them first)")
    return files


def _rewrite(source: Path, folder: Path, rename: Callable[[str], str | None]) -> dict[str, tuple[int, ...]]:
    """Copy every weight file under its new names, one file in memory at a time; returns the shapes by new name."""
    files, shapes, places, size = _weight_files(source), {}, {}, 0
    for number, file in enumerate(files, start=1):
        whole = len(files) == 1
        target = "model.safetensors" if whole else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors: dict[str, torch.Tensor] = {}
        with safe_open(file, "pt") as opened:
            for old in list(opened.keys()):
                if (new := rename(old)) is not None:
                    if new in shapes:
                        raise ConversionError(f"{file.name}: {old} comes twice")
                    tensors[new] = opened.get_tensor(old)
                    shapes[new], places[new] = tuple(tensors[new].shape), target
        size += sum(t.numel() * t.element_size() for t in tensors.values())
        save_file(tensors, folder / target, metadata={"format": "pt"})
    if len(files) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    return shapes


def _check(found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]], source: Path) -> None:
    problems = [f"unknown key {name.removeprefix('?')}" for name in sorted(found.keys() - expected.keys())]
    problems += [f"missing key {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [
        f"{name} has shape {found[name]}, the configuration asks for {expected[name]}"
        for name in sorted(found.keys() & expected.keys())
        if found[name] != expected[name]
    ]
    if problems:
        raise ConversionError(f"{source}: {len(problems)} problems\n  " + "\n  ".join(problems))


def _common_dtype(folder: Path) -> str:
    dtypes = set()
    for file in _weight_files(folder):
        with safe_open(file, "pt") as opened:
            dtypes |= {opened.get_slice(name).get_dtype() for name in list(opened.keys())}
    return {"F16": "float16", "BF16": "bfloat16"}.get(dtypes.pop(), "float32") if len(dtypes) == 1 else "float32"


def _processor(reference: Path, config: FlashSlothConfig) -> FlashSlothProcessor:
    """The processor of a released checkpoint, in the layout it was evaluated with: no space before the query tokens."""
    processor = FlashSlothProcessor(
        FlashSlothImageProcessor(tiling=config.tiling, size=config.vision_config.image_size),
        # Without a config, the released config.json would be read as ours, which it only resembles.
        AutoTokenizer.from_pretrained(reference, config=config.text_config),
        num_image_tokens=config.num_image_tokens,
        num_query_tokens=config.num_query_tokens,
        query_separator="",
    )
    for name in ("query_token_id", "image_token_id", "query_bias_token_id", "eos_token_id", "pad_token_id"):
        ours, theirs = getattr(processor, name), getattr(config, name)
        if ours != theirs:
            raise ConversionError(f"{reference}: {name} is {ours} in the tokenizer, {theirs} in config.json")
    return processor


def _list_files(folder: Path) -> None:
    """Write `export.json` as training does beside its exports: who opens it compares the sha256 of each file."""
    hashes = {}
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            hashes[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    listed = {"version": 1, "step": 0, "files": hashes}  # nobody knows the steps that a released model was trained for
    (folder / "export.json").write_text(json.dumps(listed, indent=1))


class _NewFolder:
    """A new folder, written under a temporary name and renamed when everything in it is complete."""

    def __init__(self, out: Path):
        self.out = out

    def __enter__(self) -> Path:
        if self.out.exists() and any(self.out.iterdir()):
            raise ConversionError(f"{self.out} is not empty: give a new folder, nothing is overwritten")
        self.out.parent.mkdir(parents=True, exist_ok=True)
        self.folder = Path(tempfile.mkdtemp(prefix=f".{self.out.name}.", dir=self.out.parent))
        return self.folder

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            shutil.rmtree(self.folder)
            return
        self.folder.chmod(0o755)
        if self.out.exists():
            self.out.rmdir()
        self.folder.rename(self.out)
