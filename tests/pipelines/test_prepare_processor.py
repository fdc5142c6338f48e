"""The processor of a preparation: saved, or the published model's."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.preparation.processor import load_processor
from pipelines.preparation.settings import PrepareSettings
from pipelines.preparation.sources import PlanError
from pipelines.prepare import make_terms
from tests.fixtures.tiny import build_processor, train_tokenizer

BASE = {"sources": [{"path": "corpus.json"}], "output": "out"}


def test_saved_processor_is_the_same(tmp_path: Path) -> None:
    saved = build_processor("hd")
    saved.save_pretrained(tmp_path)
    assert load_processor(PrepareSettings(**BASE, processor=str(tmp_path))).identity() == saved.identity()


@pytest.mark.parametrize(("tiling", "num_tokens"), [(None, 81), ("base", 81), ("hd", 405)])
def test_published_processor_around_a_tokenizer(tmp_path: Path, tiling: str | None, num_tokens: int) -> None:
    train_tokenizer().save_pretrained(tmp_path)
    processor = load_processor(PrepareSettings(**BASE, tokenizer=str(tmp_path), tiling=tiling))
    assert processor.num_image_tokens == num_tokens
    assert (processor.image_processor.tiling, processor.image_processor.size) == (tiling or "base", 384)


def test_a_path_may_begin_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    build_processor().save_pretrained(tmp_path / "saved")
    settings = PrepareSettings(**BASE, processor="~/saved", payload="features", encoder={"path": "~/model"})
    assert load_processor(settings).identity() == build_processor().identity()
    assert settings.encoder and settings.encoder.path == f"{tmp_path}/model"
    assert PrepareSettings(**BASE, tokenizer="~/saved").tokenizer == f"{tmp_path}/saved"
    assert PrepareSettings(**BASE, tokenizer="microsoft/phi-2").tokenizer == "microsoft/phi-2"


def test_folder_without_a_tower_is_named(tmp_path: Path) -> None:
    build_processor().save_pretrained(tmp_path)
    encoder = {"path": str(tmp_path)}
    settings = PrepareSettings(**BASE, processor=str(tmp_path), payload="features", encoder=encoder)
    with pytest.raises(PlanError, match=f"^encoder: {tmp_path} holds no tower to load: ") as raised:
        make_terms(settings, load_processor(settings))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("field", ["processor", "tokenizer"])
def test_folder_without_one_is_named(tmp_path: Path, field: str) -> None:
    with pytest.raises(PlanError, match=f"^{field}: {tmp_path}"):
        load_processor(PrepareSettings(**BASE, **{field: str(tmp_path)}))
