"""Exports: complete ones load, and what is left of any other is no model and says so."""

from __future__ import annotations

import signal

import pytest
import torch

from flashsloth import FlashSlothProcessor
from pipelines import storage
from pipelines.serving.checkpoint import CheckpointError, check_folder
from pipelines.training.export import ExportError, fetch_export, load_export, read_export_step, write_export
from pipelines.training.model_settings import ModelSettings
from pipelines.training.start import load_processor
from tests.ranks import RankGroup
from tests.training import check_export, recipe, write_data
from tests.training_ranks import die_before_rename, die_writing_weights, export_and_die, start_ranks, train_on


def test_an_export_loads_and_replaces_the_one_before(tiny_model, processor, tmp_path):
    target = tmp_path / "export"
    for step in (1, 2):
        write_export(str(target), tiny_model, tiny_model.state_dict(), processor, step)
        assert read_export_step(str(target)) == step
    loaded = load_export(str(target), torch.float32)
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in tiny_model.state_dict().items())
    assert FlashSlothProcessor.from_pretrained(target).identity() == processor.identity()
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".export")] == []


def test_a_folder_that_is_no_checkpoint_is_refused_by_name(tmp_path):
    with pytest.raises(ExportError, match=r"nowhere: there is no such checkpoint folder"):
        fetch_export(str(tmp_path / "nowhere"))
    (tmp_path / "readme.txt").write_text("hello")
    with pytest.raises(ExportError, match=r"lacks config.json and model.safetensors or .*; it holds readme.txt"):
        fetch_export(str(tmp_path))


def refusals(target: str, serving: str) -> None:
    """Whoever is given what a killed export left says what it is: a training run, an evaluation, a service."""
    for load in (lambda: load_processor(ModelSettings(checkpoint=target)), lambda: load_export(target, torch.float32)):
        with pytest.raises(ExportError, match="killed half-way"):
            load()
    with pytest.raises(CheckpointError, match=serving):
        check_folder(target)
    assert read_export_step(target) is None


def test_an_export_that_is_killed_half_way_is_no_model_and_the_same_command_completes_it(tmp_path):
    """The rank of a real run is killed: with half of the weights written, then with all of it and not yet in place."""
    prepared = write_data(tmp_path / "prepared", rows=8)
    settings = recipe(prepared, tmp_path, scaling__num_workers=1, max_steps=1)
    export = tmp_path / "run" / "export"
    for trouble, files in ((die_writing_weights, {"config.json"}), (die_before_rename, {"config.json", "export.json"})):
        group = start_ranks(1, settings, tmp_path / "logs", trouble=trouble)
        assert group.wait() == [-signal.SIGKILL], group.said()
        [remains] = export.parent.glob(".export.*.part")  # those of the attempt before are gone
        assert files <= {path.name for path in remains.iterdir()}
        refusals(str(export), "no such folder")
        with pytest.raises(ExportError, match="is no checkpoint but what an export left that was killed half-way"):
            load_export(str(remains), torch.float32)
    said = train_on(1, settings, tmp_path / "logs")
    assert "(step 1, every file verified" in said and "exported the model to" in said
    check_export(str(export), prepared)
    check_folder(str(export))
    assert not list(export.parent.glob(".export.*"))


@pytest.mark.s3
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_an_upload_over_an_earlier_export_that_is_killed_is_no_model(tiny_model, processor, s3_uri, tmp_path, file):
    target = f"{s3_uri}/export"
    write_export(target, tiny_model, tiny_model.state_dict(), processor, step=1)
    group = RankGroup(1, export_and_die, target, file, logs=tmp_path / "logs")
    assert group.wait() == [-signal.SIGKILL], group.said()
    assert storage.exists(f"{target}/tokenizer.json")  # of the earlier one, or of the new one
    refusals(target, "no config.json, or its export was killed half-way")
    write_export(target, tiny_model, tiny_model.state_dict(), processor, step=2)
    assert read_export_step(target) == 2
    load_export(target, torch.float32)
    check_folder(target)


def test_an_export_that_has_lost_a_file_is_refused_by_name(tiny_model, processor, tmp_path):
    write_export(str(tmp_path / "export"), tiny_model, tiny_model.state_dict(), processor, step=1)
    (tmp_path / "export" / "tokenizer.json").unlink()
    with pytest.raises(ExportError, match=r"export.json lists tokenizer.json, which is gone"):
        load_export(str(tmp_path / "export"), torch.float32)


def test_missing_weights_are_listed_not_made_up(tiny_model, processor, tmp_path):
    weights = tiny_model.state_dict()
    del weights["model.projector.linear_1.weight"]
    write_export(str(tmp_path / "export"), tiny_model, weights, processor, 1)
    with pytest.raises(ExportError, match=r"missing_keys: model\.projector\.linear_1\.weight"):
        load_export(str(tmp_path / "export"), torch.float32)
