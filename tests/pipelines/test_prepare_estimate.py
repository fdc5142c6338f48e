"""The estimate of a dry run against the bytes that are then written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.preparation.estimate import estimate_bytes, image_bytes
from pipelines.preparation.sources import PlanError
from tests.corpus import row, write_corpus, write_processor
from tests.preparation import begin, prepare_here, prepare_settings


@pytest.mark.parametrize(
    "change",
    [
        {"payload": "pixels"},
        {"payload": "original"},
        {"payload": "features", "encoder": {"dtype": "int8"}},
    ],
)
def test_estimate_is_near_what_is_written(tmp_path: Path, tiny_checkpoint: Path, change: dict[str, Any]) -> None:
    turns = [
        {"from": "human", "value": "<image>\n" + "What color is it? " * 40},
        {"from": "gpt", "value": "Red. " * 40},
    ]
    write_corpus(tmp_path, [row(number) | ({"conversations": turns} if number == 4 else {}) for number in range(90)])
    write_processor(tmp_path)
    if encoder := change.get("encoder"):
        change = change | {"encoder": encoder | {"path": str(tiny_checkpoint)}, "processor": str(tiny_checkpoint)}
    settings = prepare_settings(tmp_path, chunk_rows=2, **change)
    ledger, maker = begin(settings)
    estimate = estimate_bytes(ledger.plan, maker.files)
    written = sum(shard.bytes for shard in prepare_here(settings).shards)
    assert estimate == pytest.approx(written, rel=0.3)


def test_rows_that_name_images_need_a_root_in_a_dry_run_too(tmp_path: Path) -> None:
    write_corpus(tmp_path, 8)
    write_processor(tmp_path)
    source = {"path": str(tmp_path / "corpus.jsonl")}
    ledger, maker = begin(prepare_settings(tmp_path, sources=[source], pin_images=False))
    with pytest.raises(
        PlanError, match=r"source 'corpus': .*corpus\.jsonl:1 has an image, but .* no image_root: set it"
    ):
        estimate_bytes(ledger.plan, maker.files)
    write_corpus(tmp_path, [row(3), row(0, image="http://host/a.jpg")])  # which no root would help
    ledger, maker = begin(prepare_settings(tmp_path, sources=[source], output=str(tmp_path / "other")))
    assert estimate_bytes(ledger.plan, maker.files) > 0


def test_a_picture_takes_what_the_documents_say() -> None:
    assert image_bytes([1, 729, 1152], "float16") == 1_679_616  # 1.68 MB an image
    assert image_bytes([1, 729, 1152], "int8") == 839_808 + 2 * 729
    assert image_bytes([5, 3, 384, 384], "uint8") == 5 * 442_368
    assert image_bytes(None, None) is None
