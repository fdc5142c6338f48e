"""A folder that cannot be served is refused, and the reason is said."""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipelines import storage
from pipelines.serving import checkpoint_files
from pipelines.serving.checkpoint import CheckpointError, check_folder, check_hashes, load_model, load_processor
from pipelines.serving.engine import Encoder, Engine
from tests.serving import flip_a_bit, list_files


@pytest.fixture
def folder(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


def change_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_an_exported_folder_opens(tiny_checkpoint: Path) -> None:
    engine = Engine.from_checkpoint(tiny_checkpoint, device="cpu")
    assert engine.model.dtype == torch.float32
    assert not engine.model.training
    assert load_model(tiny_checkpoint, "cpu", "bfloat16").dtype == torch.bfloat16


def test_a_missing_folder() -> None:
    with pytest.raises(CheckpointError, match="/nowhere: no such folder"):
        check_folder("/nowhere")


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        check_folder(folder)


def test_a_config_that_is_no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json is no JSON"):
        check_folder(folder)


def test_another_architecture(folder: Path) -> None:
    change_config(folder, model_type="llava")
    with pytest.raises(CheckpointError, match="model_type 'llava', not 'flashsloth'"):
        check_folder(folder)


def test_a_released_checkpoint_is_pointed_to_conversion(folder: Path) -> None:
    change_config(folder, model_type="phi")
    with pytest.raises(CheckpointError, match=r"jobs/convert\.py"):
        check_folder(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"text_config": 3},
        {"vision_config": {"image_size": "a"}},
        {"vision_config": {"patch_size": 0}},
        {"tiling": 5},
        {"num_query_tokens": "nine"},
    ],
)
def test_a_config_that_describes_no_model(folder: Path, changes: dict[str, object]) -> None:
    change_config(folder, **changes)
    for load in (load_processor, load_model):
        with pytest.raises(CheckpointError, match=rf"^{folder}/config\.json describes no model \(\w+: .+\)$"):
            load(folder)


def test_an_index_of_weights_that_is_none(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match=rf"^{folder}: no model can be loaded from its weights \(\w+: .+\)$"):
        load_model(folder)


def test_pickled_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        load_model(folder)


def test_truncated_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=str(folder)):
        load_model(folder)


def test_a_file_that_is_not_the_one_that_was_exported(folder: Path) -> None:
    """Right in size and form, wrong in one bit: only the list of hashes tells."""
    list_files(folder)
    assert load_model(folder, "cpu").dtype == torch.float32
    flip_a_bit(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has sha256 .*, the exported file had"):
        load_model(folder, "cpu")


def test_a_file_of_the_export_that_is_missing(folder: Path) -> None:
    list_files(folder)
    (folder / "generation_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"generation_config\.json is missing, which was exported"):
        check_hashes(folder, folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"hashes": {}}', '{"files": 3}'])
def test_a_list_of_files_that_cannot_be_read(folder: Path, content: str) -> None:
    (folder / "export.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"export\.json: this is no list of exported files"):
        check_hashes(folder, folder)


def test_missing_and_surplus_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    name = "model.query_tokens"
    kept = {key: value for key, value in weights.items() if key != name}
    save_file(kept, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"1 missing keys, first {name}"):
        load_model(folder)
    save_file({**weights, "model.surplus": weights[name].clone()}, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 unexpected keys, first model\.surplus"):
        load_model(folder)


def test_no_processor(folder: Path) -> None:
    for file in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    with pytest.raises(CheckpointError, match="no processor"):
        load_processor(folder)


@pytest.mark.parametrize(
    ("name", "content", "blamed"),
    [
        ("tokenizer.json", "{}", "tokenizer.json and tokenizer_config.json"),
        ("tokenizer_config.json", "[]", "tokenizer.json and tokenizer_config.json"),
        ("processor_config.json", "[]", "processor_config.json"),
        ("processor_config.json", '{"image_processor": {"tiling": 5}}', "processor_config.json"),
    ],
)
def test_a_processor_s_file_that_is_none(folder: Path, name: str, content: str, blamed: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=rf"^{folder}: no processor can be loaded from its {blamed} \(\w+: .+\)$"):
        load_processor(folder)


def test_a_processor_of_another_model(folder: Path) -> None:
    file = folder / "processor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_image_tokens": 81}))
    with pytest.raises(CheckpointError, match="num_image_tokens 81, its model 9"):
        load_processor(folder)


@pytest.mark.s3
def test_a_copy_of_a_checkpoint_in_a_bucket_does_not_outlive_its_loading(
    folder: Path, s3_uri: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    list_files(folder)
    for file in folder.iterdir():
        storage.write_bytes(f"{s3_uri}/export/{file.name}", file.read_bytes())
    copies = tmp_path_factory.mktemp("copies")
    monkeypatch.setattr(tempfile, "tempdir", str(copies))
    copied: list[str] = []
    monkeypatch.setattr(
        checkpoint_files, "download", lambda uri, path: (copied.append(path.name), storage.download(uri, path))
    )
    load_processor(f"{s3_uri}/export")
    assert "processor_config.json" in copied
    assert "model.safetensors" not in copied, "an ingress needs no weights"
    with Engine.from_checkpoint(f"{s3_uri}/export", device="cpu") as engine:
        assert not list(copies.iterdir())
        prompt = Encoder(engine.processor).prompt([{"role": "user", "content": "What is it?"}])
        [answer] = engine.generate([prompt])  # of weights whose file is gone
    with Engine.from_checkpoint(folder, device="cpu") as engine:
        assert engine.generate([prompt]) == [answer]
    storage.write_bytes(f"{s3_uri}/export/model.safetensors", b"cut")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has sha256"):
        load_model(f"{s3_uri}/export", "cpu")
    assert not list(copies.iterdir())
