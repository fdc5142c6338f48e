"""Released checkpoints <-> ours: one table of names, applied to the tensors of safetensors files bit for bit.

The released naming is that of the published code (see the table in the README); its `config.json` is Phi's with a few
fields more, and leaves out the vision tower (SigLIP-so400m) and the ids of the placeholders.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoTokenizer

from .configuration_flashsloth import SO400M_PATCH14_384, FlashSlothConfig
from .image_processing_flashsloth import FlashSlothImageProcessor
from .modeling_flashsloth import FlashSlothForConditionalGeneration
from .processing_flashsloth import FlashSlothProcessor

# (released prefix, our prefix). {query} is the place of the embedded query module.
NAMES = (
    ("model.embed_tokens.", "model.language_model.embed_tokens."),
    ("model.layers.", "model.language_model.layers."),
    ("model.final_layernorm.", "model.language_model.final_layernorm."),
    ("lm_head.", "lm_head."),
    ("model.vision_tower.vision_tower.vision_model.", "model.vision_tower."),
    ("model.pooling.mlp.0.", "model.pooling.score_in."),
    ("model.pooling.mlp.3.", "model.pooling.score_out."),
    ("model.mm_projector.0.", "model.projector.linear_1."),
    ("model.mm_projector.2.", "model.projector.linear_2."),
    ("model.learnable_tokens.token", "model.query_tokens"),
    ("model.lqformer.down_projector_learnable_text.", "{query}.down_text."),
    ("model.lqformer.down_projector_image.", "{query}.down_image."),
    ("model.lqformer.up_projector.", "{query}.up."),
    ("model.lqformer.layers.0.ln_text.", "{query}.norm_text."),
    ("model.lqformer.layers.0.ln_q.", "{query}.norm_query."),
    ("model.lqformer.layers.0.ln_kv.", "{query}.norm_image."),
    ("model.lqformer.layers.0.t2q_attn.", "{query}.text_attention."),
    ("model.lqformer.layers.0.i2q_attn.", "{query}.image_attention."),
)
# What a released checkpoint may hold though no forward of it ever reads it: dropped on the way in, and said so.
UNREAD = re.compile(
    r"model\.vision_tower\.vision_tower\.vision_model\.(post_layernorm|head)\.|\.rotary_emb\.inv_freq$|\.position_ids$"
)


class ConversionError(ValueError):
    """The folder is not a checkpoint that can be converted; the message lists what is wrong with it."""


def released_name(name: str, config: FlashSlothConfig) -> str | None:
    """The released name of our tensor `name`; None where it has none."""
    return _rename(name, [(ours, theirs) for theirs, ours in _table(config)])


def our_name(name: str, config: FlashSlothConfig) -> str | None:
    """Our name of the released tensor `name`; None where it has none."""
    return _rename(name, _table(config))


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


def config_from_released(released: dict[str, Any]) -> FlashSlothConfig:
    """Our configuration from a released `config.json`.

    `vision_config` and the `*_token_id` fields, which released files leave out, default to SigLIP-so400m and the ids
    that the released tokenizer gives.
    """
    rope = {
        "rope_type": "default",
        "rope_theta": released.get("rope_theta", 10000.0),
        "partial_rotary_factor": released.get("partial_rotary_factor", 0.4),
    }
    text = {name: released[name] for name in _PHI_FIELDS if name in released} | {"rope_parameters": rope}
    vision = dict(released.get("vision_config") or SO400M_PATCH14_384 | {"num_hidden_layers": 27})
    vision |= {"num_hidden_layers": vision["num_hidden_layers"] - 1, "vision_use_head": False}
    ids = {k: released[k] for k in ("image_token_id", "query_token_id", "query_bias_token_id") if k in released}
    if released.get("mm_projector_type", "mlp2x_gelu") != "mlp2x_gelu":
        raise ConversionError(f"mm_projector_type is {released['mm_projector_type']!r}, only mlp2x_gelu is known")
    if "vision_config" in released:
        # Only the tiny test models say so; their inner width follows the vision width as 576 follows 1152.
        ids |= {"query_hidden_size": vision["hidden_size"] // 2, "eos_token_id": released.get("eos_token_id")}
        ids |= {"pad_token_id": released.get("pad_token_id", 0)}
    hd = released.get("image_hd") or released.get("model_hd")
    return FlashSlothConfig(text_config=text, vision_config=vision, tiling="hd" if hd else "base", **ids)


def config_to_released(config: FlashSlothConfig) -> dict[str, Any]:
    """The released `config.json` of our configuration, with the fields that released files leave out added."""
    text, vision = config.text_config.to_dict(), config.vision_config.to_dict()
    rope = text["rope_parameters"]
    return {name: text[name] for name in _PHI_FIELDS if name in text} | {
        "model_type": "flashsloth",
        "rope_theta": rope["rope_theta"],
        "partial_rotary_factor": rope["partial_rotary_factor"],
        "rope_scaling": None,
        "mm_hidden_size": vision["hidden_size"],
        "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "image_hd": config.tiling == "hd",
        "image_token_id": config.image_token_id,
        "query_token_id": config.query_token_id,
        "query_bias_token_id": config.query_bias_token_id,
        "eos_token_id": config.eos_token_id,
        "pad_token_id": config.pad_token_id,
        "vision_config": {name: vision[name] for name in _SIGLIP_FIELDS}
        | {"num_hidden_layers": vision["num_hidden_layers"] + 1},
    }


_PHI_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "layer_norm_eps",
    "initializer_range",
    "qk_layernorm",
    "resid_pdrop",
    "embd_pdrop",
    "attention_dropout",
    "tie_word_embeddings",
    "use_cache",
)
_SIGLIP_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
)


def _table(config: FlashSlothConfig) -> list[tuple[str, str]]:
    query = f"model.language_model.layers.{config.query_layer}.embedded_query"
    return [(theirs, ours.format(query=query)) for theirs, ours in NAMES]


def _rename(name: str, table: list[tuple[str, str]]) -> str | None:
    # The longest prefix counts: EmbQ's place lies inside the language model's layers.
    matches = [(len(old), old, new) for old, new in table if name.startswith(old)]
    if not matches:
        return None
    _, old, new = max(matches)
    return new + name[len(old) :]


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
