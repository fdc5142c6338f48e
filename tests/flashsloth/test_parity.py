"""What the published model computed, through `jobs/convert.py` on a folder that looks like a released checkpoint."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.released_format import our_name, released_name
from jobs import convert
from pipelines.serving.checkpoint_files import CheckpointError, check_hashes, exported_files
from pipelines.training.export import fetch_export
from tests.fixtures.tiny import train_tokenizer
from tests.serving import flip_a_bit

GOLDEN = Path(__file__).parents[1] / "golden"
BATCHES = ("single", "multiturn", "stage1")


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("released")
    shutil.copy(GOLDEN / "weights.safetensors", folder / "model.safetensors")
    shutil.copy(GOLDEN / "reference_config.json", folder / "config.json")
    return folder


@pytest.fixture(scope="module")
def converted(released: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "checkpoint"
    assert convert.main(["--reference", str(released), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def model(request: pytest.FixtureRequest, converted: Path) -> FlashSlothForConditionalGeneration:
    loaded = FlashSlothForConditionalGeneration.from_pretrained(
        converted, dtype=torch.float32, attn_implementation=request.param
    )
    return loaded.eval()


def inputs_of(golden: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    names = ("input_ids", "attention_mask", "labels", "question_ids", "pixel_values")
    inputs = {name: golden[name] for name in names if name in golden}
    inputs["pixel_values"] = inputs["pixel_values"].float()
    return inputs


@pytest.mark.parametrize("name", BATCHES)
def test_logits_and_loss(model: FlashSlothForConditionalGeneration, name: str) -> None:
    golden = load_file(GOLDEN / f"{name}.safetensors")
    with torch.no_grad():
        output = model(**inputs_of(golden))
    every = output.logits.shape[-1] // golden["logits"].shape[-1]
    real = golden["attention_mask"].bool()
    assert (output.logits[..., ::every] - golden["logits"])[real].abs().max() < 1e-4
    assert abs(output.loss - golden["loss"]) < 1e-4


@pytest.mark.parametrize("name", BATCHES)
def test_every_part(model: FlashSlothForConditionalGeneration, name: str) -> None:
    golden = load_file(GOLDEN / f"{name}.safetensors")
    pixels = golden["pixel_values"].float()
    seen: dict[str, torch.Tensor] = {}
    query_layer = model.model.language_model.layers[model.config.query_layer]

    def watch(_: object, args: tuple, output: torch.Tensor) -> None:
        hidden_states, _, plan = args
        for key, states in (("embq_in", hidden_states), ("embq_out", output)):
            seen[key] = states.flatten(0, 1)[plan.positions].unflatten(0, (-1, model.config.num_query_tokens))

    hook = query_layer.embedded_query.register_forward_hook(watch)
    with torch.no_grad():
        patches = model.get_patch_features(pixels)[:, 0]
        visual = model(**inputs_of(golden)).image_hidden_states
        pooled = model.model.pooling(patches)
    hook.remove()
    seen |= {"vision_features": patches, "pooled": pooled, "visual_tokens": visual}
    for key, value in seen.items():
        assert value.shape == golden[key].shape, key
        assert (value - golden[key]).abs().max() < 1e-4, key


@pytest.mark.parametrize("name", BATCHES)
def test_gradients(model: FlashSlothForConditionalGeneration, name: str) -> None:
    golden = load_file(GOLDEN / f"{name}.safetensors")
    model.zero_grad()
    model(**inputs_of(golden)).loss.backward()
    compared = 0
    for ours, parameter in model.named_parameters():
        expected = golden.get(f"grad.{released_name(ours, model.config)}")
        if expected is None:
            # The published tower runs without gradient (fault 4); ours must have one.
            assert "vision_tower" in ours
            assert parameter.grad is not None and bool(parameter.grad.any()), ours
            continue
        compared += 1
        # Biases before a softmax have no gradient; what is recorded of them, 1e-8 and less, is rounding.
        assert parameter.grad.norm().item() == pytest.approx(expected.item(), rel=1e-3, abs=1e-7), ours
    assert compared == sum(key.startswith("grad.") for key in golden)


@pytest.mark.parametrize("name", ["generate0", "generate1"])
def test_greedy_tokens(model: FlashSlothForConditionalGeneration, name: str) -> None:
    golden = load_file(GOLDEN / f"{name}.safetensors")
    prompt = inputs_of(golden)
    tokens = model.generate(
        **prompt, attention_mask=torch.ones_like(prompt["input_ids"]), max_new_tokens=16, do_sample=False
    )
    assert torch.equal(tokens[:, prompt["input_ids"].shape[1] :], golden["generated"])


@pytest.mark.parametrize("name", BATCHES)
def test_placeholders_expand_to_the_golden_ids(name: str) -> None:
    golden = load_file(GOLDEN / f"{name}.safetensors")
    for compact, kept, expanded, real in zip(
        golden["compact.input_ids"],
        golden["compact.attention_mask"].bool(),
        golden["input_ids"],
        golden["attention_mask"].bool(),
        strict=True,
    ):
        ids = [
            copy
            for token in compact[kept].tolist()
            for copy in ([994] * 9 if token == -200 else [995] * 9 if token == 995 else [token])
        ]
        assert ids == expanded[real].tolist()


def test_back_to_the_released_naming_bit_for_bit(released: Path, converted: Path, tmp_path: Path) -> None:
    assert convert.main(["--checkpoint", str(converted), "--out", str(tmp_path / "back")]) == 0
    before, after = load_file(released / "model.safetensors"), load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    # The configuration that comes back makes the same model.
    assert convert.main(["--reference", str(tmp_path / "back"), "--out", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "config.json").read_text() == (converted / "config.json").read_text()


def test_what_was_converted_is_checked_like_an_export(converted: Path, tmp_path: Path) -> None:
    """Serving and training read the list of hashes that training writes beside its own exports."""
    folder = Path(shutil.copytree(converted, tmp_path / "copy"))
    assert exported_files(folder).keys() == {path.name for path in folder.iterdir()} - {"export.json"}
    check_hashes(folder, folder)
    assert fetch_export(str(folder)) == folder
    flip_a_bit(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors has sha256"):
        check_hashes(folder, folder)


def test_every_name_has_one_counterpart(model: FlashSlothForConditionalGeneration) -> None:
    for ours in model.state_dict():
        theirs = released_name(ours, model.config)
        assert theirs is not None
        assert our_name(theirs, model.config) == ours


def tamper(released: Path, folder: Path, change: dict[str, torch.Tensor | None]) -> Path:
    weights = load_file(released / "model.safetensors") | {k: v for k, v in change.items() if v is not None}
    folder.mkdir()
    save_file({k: v for k, v in weights.items() if change.get(k, 1) is not None}, folder / "model.safetensors")
    shutil.copy(released / "config.json", folder)
    return folder


def test_unknown_missing_and_misshapen_keys_are_listed_and_refused(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change = {
        "model.extra.weight": torch.zeros(2),
        "model.layers.3.mlp.fc1.bias": None,
        "lm_head.bias": torch.zeros(7, dtype=torch.float16),
    }
    folder = tamper(released, tmp_path / "odd", change)
    assert convert.main(["--reference", str(folder), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert "unknown key model.extra.weight" in said
    assert "missing key model.language_model.layers.3.mlp.fc1.bias" in said
    assert "lm_head.bias has shape (7,), the configuration asks for (1000,)" in said
    assert not (tmp_path / "out").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["odd"], "nothing half-written is left behind"


def test_what_no_forward_reads_is_dropped_and_said(
    released: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unread = "model.vision_tower.vision_tower.vision_model.post_layernorm.weight"
    folder = tamper(released, tmp_path / "with-norm", {unread: torch.zeros(48)})
    assert convert.main(["--reference", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert f"dropped {unread}" in capsys.readouterr().out


def test_sharded_weights(released: Path, converted: Path, tmp_path: Path) -> None:
    weights = load_file(released / "model.safetensors")
    names = sorted(weights)
    parts = {"model-00001-of-00002.safetensors": names[:50], "model-00002-of-00002.safetensors": names[50:]}
    folder = tmp_path / "sharded"
    folder.mkdir()
    for file, part in parts.items():
        save_file({name: weights[name] for name in part}, folder / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    shutil.copy(released / "config.json", folder)
    assert convert.main(["--reference", str(folder), "--out", str(tmp_path / "out")]) == 0
    whole = FlashSlothForConditionalGeneration.from_pretrained(converted).state_dict()
    for name, tensor in FlashSlothForConditionalGeneration.from_pretrained(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, whole[name]), name


def test_wrong_folders_are_named(
    released: Path, converted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert convert.main(["--reference", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert f"{tmp_path / 'config.json'} is missing" in capsys.readouterr().err
    assert convert.main(["--checkpoint", str(released), "--out", str(tmp_path / "out")]) == 1
    assert "not one that this library saved" in capsys.readouterr().err
    assert convert.main(["--reference", str(released), "--out", str(converted)]) == 1
    assert "is not empty" in capsys.readouterr().err
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(released / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"")
    assert convert.main(["--reference", str(pickled), "--out", str(tmp_path / "out")]) == 1
    assert "holds no .safetensors" in capsys.readouterr().err


def test_a_released_tokenizer_comes_along_with_its_layout(released: Path, tmp_path: Path) -> None:
    """The ids of the tokenizer must be those of config.json; the processor lays prompts out as the release did."""
    processor = FlashSlothProcessor.from_pretrained
    folder = tmp_path / "with-tokenizer"
    shutil.copytree(released, folder)
    tokenizer = train_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<learnable>", "</s>"]})
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert convert.main(["--reference", str(folder), "--out", str(tmp_path / "refused")]) == 1

    ids = tokenizer.get_vocab()
    config |= {"query_token_id": ids["<learnable>"], "eos_token_id": ids["</s>"], "image_token_id": len(tokenizer)}
    config |= {"query_bias_token_id": tokenizer.encode(" .")[0], "pad_token_id": tokenizer.pad_token_id}
    (folder / "config.json").write_text(json.dumps(config))
    assert convert.main(["--reference", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert processor(tmp_path / "out").query_separator == ""
    assert processor(tmp_path / "out").num_image_tokens == 9
