"""Rows that name an image in a source without an image root: an error of the recipe, or of the row."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.preparation.plan import load_plan
from pipelines.preparation.sources import PlanError
from tests.corpus import encoded, row, write_corpus, write_processor
from tests.preparation import begin, prepare_here, prepare_settings


def test_a_row_that_names_an_image_needs_a_root_when_the_plan_is_made(tmp_path: Path) -> None:
    write_processor(tmp_path)
    source = {"path": str(tmp_path / "corpus.jsonl")}
    settings = prepare_settings(tmp_path, sources=[source])
    write_corpus(tmp_path, [row(3), row(0, image="../a.jpg"), row(7, image="images/0.jpg"), *[row(3)] * 9, row(0)])
    with pytest.raises(PlanError, match=r"corpus\.jsonl:13 has an image, but the source has no image_root: set it"):
        begin(settings)
    assert not Path(settings.output).exists()
    write_corpus(tmp_path, [row(3)] * 9)
    assert prepare_here(settings).written == 9
    plan = load_plan(settings.output)
    assert plan and plan.pins is None


@pytest.mark.parametrize("format", ["parquet", "messages", "webdataset"])
def test_a_row_that_names_its_image_where_others_bring_theirs_is_quarantined(tmp_path: Path, format: str) -> None:
    write_processor(tmp_path)
    path = tmp_path / {"parquet": "a.parquet", "messages": "a.jsonl", "webdataset": "a.tar"}[format]
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    uri = "data:image/jpeg;base64," + base64.b64encode(encoded(0)).decode()
    talks = [
        {"messages": [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "Q"}]}]}
        for image in (uri, uri, "images/0.jpg", uri, uri)
    ]
    for talk in talks:
        talk["messages"].append({"role": "assistant", "content": [{"type": "text", "text": "A"}]})
    if format == "parquet":
        images = [{"bytes": None if n == 2 else encoded(0), "path": "images/0.jpg"} for n in range(5)]
        pq.write_table(pa.Table.from_pylist([{"image": image, "conversations": turns} for image in images]), path)
    elif format == "messages":
        path.write_text("\n".join(map(json.dumps, talks)))
    else:
        with tarfile.open(path, "w") as tar:
            for n, data in enumerate(json.dumps(talk).encode() for talk in talks):
                member = tarfile.TarInfo(f"{n}.json")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    settings = prepare_settings(tmp_path, sources=[{"path": str(path), "format": format}], max_quarantined_share=0.2)
    manifest = prepare_here(settings)
    assert (manifest.written, manifest.quarantine_reasons) == (4, {"image_missing": 1})
    [bad] = pq.read_table(Path(settings.output) / "quarantine.parquet").to_pylist()
    assert bad["key"] == "a:2"
    assert bad["detail"] == "names 'images/0.jpg', has no bytes, and the source has no image_root"


def test_a_json_in_a_tar_may_name_an_image_that_lies_elsewhere(tmp_path: Path) -> None:
    """It is quarantined without an image root, and pinned below one, as in any other format."""
    write_corpus(tmp_path, 1)  # images/0.jpg
    write_processor(tmp_path)
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for n, data in enumerate(json.dumps(each).encode() for each in (row(0), row(3), row(7))):
            member = tarfile.TarInfo(f"{n}.json")
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    source = {"path": str(path), "format": "webdataset"}
    settings = prepare_settings(tmp_path, sources=[source], max_quarantined_share=0.4)
    manifest = prepare_here(settings)
    assert (manifest.written, manifest.quarantine_reasons) == (2, {"image_missing": 1})
    rooted = prepare_settings(tmp_path, sources=[source | {"image_root": str(tmp_path)}], output=str(tmp_path / "b"))
    assert prepare_here(rooted).written == 3
    plan = load_plan(rooted.output)
    assert plan and plan.pins and plan.pins.images == 1
