"""Every fault that a row or its image can have: the row is quarantined with its reason, and harms no other."""

from __future__ import annotations

import io
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from PIL import Image

from flashsloth.collation import IGNORED_LABEL
from pipelines.preparation.data_receipt import DataReceipt
from pipelines.preparation.inspection import Inspector
from pipelines.preparation.receipt_book import PublishError
from pipelines.records import RowError
from pipelines.shards import ShardedDataset
from pipelines.shards.receipts import QuarantinedRow, Receipt
from tests.corpus import encoded, picture, row, write_corpus, write_processor
from tests.oversize import oversize
from tests.preparation import begin, do_chunk, prepare_here, prepare_settings


def as_file(image: Image.Image, form: str) -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def turns(*texts: str, names: tuple[str, ...] = ("human", "gpt")) -> list[dict[str, str]]:
    return [{"from": names[i % 2], "value": text} for i, text in enumerate(texts)]


def cut(data: bytes, percent: int) -> tuple[str, bytes]:
    return "image_truncated", data[: len(data) * percent // 100]


PNG = as_file(picture(1), "PNG")
IMAGES: dict[str, tuple[str, bytes | None]] = {
    "no such object": ("image_missing", None),
    "zero bytes": ("image_empty", b""),
    "an HTML page": ("image_is_html", b"<!DOCTYPE html><html><body>403 Forbidden</body></html>"),
    "an XML error": ("image_is_xml", b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>'),
    "an SVG": ("image_is_svg", b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"></svg>'),
    "a PDF": ("image_is_pdf", as_file(picture(1), "PDF")),
    "an EPS": ("image_is_eps", as_file(picture(1), "EPS")),
    "a GIF": ("image_format_not_allowed", as_file(picture(1), "GIF")),
    "noise": ("image_undecodable", bytes(range(256)) * 4),
    **{
        f"a JPEG cut at {share} %": ("image_truncated", encoded(1)[: len(encoded(1)) * share // 100])
        for share in (30, 60, 95)
    },
    **{f"a PNG cut at {share} %": ("image_truncated", PNG[: len(PNG) * share // 100]) for share in (30, 60, 95)},
    "60,000 x 60,000": ("image_too_large", oversize("PNG", 60_000, 60_000)),
    "a PNG of 144 megapixels": ("image_too_large", as_file(Image.new("1", (12_000, 12_000)), "PNG")),
    "20,000 x 1": ("image_bad_size", as_file(Image.new("L", (20_000, 1)), "PNG")),
    "1 x 1": ("image_bad_size", as_file(Image.new("L", (1, 1)), "PNG")),
}
LINES: dict[str, tuple[str, bytes]] = {
    "cut off": ("row_malformed", b'{"id": "cut'),
    "no object": ("row_malformed", b"[1, 2]"),
    "a byte-order mark": ("row_malformed", b"\xef\xbb\xbf" + json.dumps(row(3)).encode()),
    "no UTF-8": ("row_malformed", json.dumps(row(3)).encode().replace(b"square", b"squ\xffre")),
    "a NUL byte": ("row_malformed", json.dumps(row(3)).encode().replace(b"square", b"squ\0re")),
    "a NUL, escaped": ("row_malformed", json.dumps(row(3)).encode().replace(b"square", b"squ\\u0000re")),
}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "turns that are text": ("row_malformed", row(3, conversations="hello")),
    "an answer that is a number": ("row_malformed", row(3, conversations=[*turns("Q"), {"from": "gpt", "value": 4}])),
    "an image that is a number": ("row_malformed", row(0, image=7)),
    "an unknown speaker": ("row_malformed", row(3, conversations=turns("Q", "A", names=("human", "robot")))),
    "a marker without an image": ("image_marker_mismatch", row(3, conversations=turns("<image>Q", "A"))),
    "more markers than images": ("image_marker_mismatch", row(0, conversations=turns("<image><image>Q", "A"))),
    "an image without a marker": ("image_marker_mismatch", row(0, conversations=turns("Q", "A"))),
    "more images than one": ("too_many_images", row(0, image=["images/0.jpg", "images/1.jpg"])),
    "a marker in a later question": ("image_marker_misplaced", row(0, conversations=turns("Q", "A", "<image>Q", "A"))),
    "an empty answer": ("empty_answer", row(3, conversations=turns("Q", ""))),
    "a blank answer": ("empty_answer", row(3, conversations=turns("Q", " \n", "Q", "A"))),
    "the answer first": ("role_order", row(3, conversations=turns("A", "Q", names=("gpt", "human")))),
    "two questions in a row": ("role_order", row(3, conversations=turns("Q", "Q", names=("human", "human")))),
    "a question alone": ("no_loss_tokens", row(3, conversations=turns("Q"))),
    "too many tokens": ("too_long", row(3, conversations=turns("Q " * 3000, "A"))),
    **{
        f"the image {path}": ("path_not_allowed", row(0, image=path))
        for path in ("../secret.jpg", "a/../../secret.jpg", "/etc/passwd", "file:///etc/passwd", "http://host/a.jpg")
    },
    **{
        f"half of a surrogate pair in {where}": ("row_malformed", content)
        for where, content in {
            "the id": row(3, id="\ud800"),
            "the name of a field": row(3, conversations=[{"\ud800": "x"}]),
            "a speaker": row(3, conversations=turns("Q", "A", names=("\ud800", "gpt"))),
            "a question": row(3, conversations=turns("\ud800", "A")),
            "a path": row(0, image="\ud800.jpg"),
        }.items()
    },
    "the image s3://": ("path_not_allowed", row(0, image="s3://bucket/a.jpg")),
}


def write_faults(folder: Path) -> list[tuple[str, str]]:
    """A corpus whose even rows are good and whose odd rows each have a fault; (what, reason) of the odd ones."""
    write_corpus(folder, 1)  # the good rows' image
    lines, faults = [], []
    for number, (what, (reason, content)) in enumerate([*IMAGES.items(), *LINES.items(), *ROWS.items()]):
        line = content if what in LINES else json.dumps(row(0, image=f"images/bad{number}.jpg")).encode()
        if what in IMAGES and content is not None:
            (folder / "images" / f"bad{number}.jpg").write_bytes(content)  # type: ignore[arg-type]
        if what in ROWS:
            line = json.dumps(content).encode()
        lines += [json.dumps(row(0)).encode(), line]
        faults.append((what, reason))
    (folder / "corpus.jsonl").write_bytes(b"\n".join([*lines, json.dumps(row(0)).encode()]) + b"\n")  # type: ignore[list-item]
    write_processor(folder)
    return faults


@pytest.mark.parametrize("payload", ["pixels", "original"])
def test_every_fault_is_quarantined_with_its_reason_and_place(tmp_path: Path, payload: str) -> None:
    faults = write_faults(tmp_path)
    settings = prepare_settings(tmp_path, payload=payload, max_quarantined_share=0.9, max_length=500, chunk_rows=7)
    ledger, maker = begin(settings)
    for number in ledger.pending:
        ledger.commit(do_chunk(ledger, maker, number))
    rejected: list[QuarantinedRow] = [
        each for number in sorted(ledger.receipts) for each in ledger.receipts[number].quarantined
    ]
    assert [(what, each.reason) for (what, _), each in zip(faults, rejected, strict=True)] == faults
    assert [each.key for each in rejected] == [f"corpus:{2 * n + 1}" for n in range(len(faults))]
    assert [each.location for each in rejected] == [f"{tmp_path}/corpus.jsonl:{2 * n + 2}" for n in range(len(faults))]
    assert all(each.detail for each in rejected)
    manifest = ledger.publish()
    assert manifest.planned == 2 * len(faults) + 1 == manifest.written + manifest.quarantined
    dataset = ShardedDataset(settings.output)
    assert [dataset.read(n)["key"] for n in range(len(dataset))] == [f"corpus:{2 * n}" for n in range(len(faults) + 1)]


def test_a_long_value_is_shortened_in_the_receipt_the_table_and_the_error(tmp_path: Path) -> None:
    image = "/9j/" + "4AAQSkZJRgABAQAA" * 20_000
    many = [{"from": ("human", "gpt")[n % 2], "value": "text"} for n in range(1000)]
    good = row(0, conversations=turns("<image>Q", "A"))
    rows = [good | {"image": image}, row(3, conversations=[*turns("Q"), {"from": image, "value": "A"}])]
    write_corpus(tmp_path, [good, *rows, good | {"conversations": [*good["conversations"], *many]}])
    write_processor(tmp_path)
    settings = prepare_settings(tmp_path, layout="caption", max_quarantined_share=0.7)
    with pytest.raises(PublishError) as raised:
        prepare_here(settings)
    assert len(str(raised.value)) < 1500
    [receipt] = (tmp_path / "out" / "receipts").iterdir()
    quarantined = Receipt.model_validate_json(receipt.read_bytes()).quarantined
    assert [each.reason for each in quarantined] == ["path_not_allowed", "row_malformed", "role_order"]
    for each in quarantined:
        assert len(each.detail) <= 700 and len(re.findall(r" \([\d,]+ characters left out\) ", each.detail)) == 1
    assert quarantined[0].detail.startswith("'/9j/4AAQ")
    assert quarantined[0].detail.endswith("': an image is a path below the source's image_root")


def test_a_gif_is_its_first_frame_where_the_source_takes_gifs(tmp_path: Path) -> None:
    write_corpus(tmp_path, 2)
    frames = [Image.new("RGB", (20, 10), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "images" / "0.jpg", "GIF", save_all=True, append_images=frames[1:])
    write_processor(tmp_path)
    for payload in ("pixels", "original"):
        source = {"path": f"{tmp_path}/corpus.jsonl", "image_root": str(tmp_path), "gif": True}
        output = str(tmp_path / payload)
        prepare_here(prepare_settings(tmp_path, sources=[source], payload=payload, output=output))
        read = ShardedDataset(output).read(0)
        if payload == "pixels":
            assert (read["pixel_values"][0, :, 5, 5] == [255, 0, 0]).all()
        else:
            assert "20 x 10 pixels" in next(iter(Inspector(output).rows(1)))


def test_ids_that_repeat_are_kept_and_counted(tmp_path: Path) -> None:
    write_corpus(tmp_path, [row(3, id="000000033471") for _ in range(9)] + [row(3, id="other")])
    write_processor(tmp_path)
    manifest = prepare_here(prepare_settings(tmp_path))
    assert (manifest.written, manifest.quarantined) == (10, 0)
    receipt = DataReceipt.model_validate_json((tmp_path / "out" / "receipt.json").read_bytes())
    assert [source.repeated_ids for source in receipt.sources] == [8]
    dataset = ShardedDataset(str(tmp_path / "out"))
    assert [dataset.read(n)["id"] for n in range(10)] == ["000000033471"] * 9 + ["other"]
    assert len({dataset.read(n)["key"] for n in range(10)}) == 10
    assert all((dataset.read(n)["labels"] != IGNORED_LABEL).any() for n in range(10))


def test_rows_that_a_weight_takes_again_are_no_repeated_ids(tmp_path: Path) -> None:
    write_corpus(tmp_path, [row(3, id="one"), row(3, id="two"), row(3, id="two")])
    write_processor(tmp_path)
    source = {"path": f"{tmp_path}/corpus.jsonl", "image_root": str(tmp_path), "weight": 2.5}
    manifest = prepare_here(prepare_settings(tmp_path, sources=[source]))
    assert manifest.written in (7, 8)
    receipt = DataReceipt.model_validate_json((tmp_path / "out" / "receipt.json").read_bytes())
    assert [each.repeated_ids for each in receipt.sources] == [1]


def test_a_long_id_is_kept_in_the_sample_and_shortened_in_the_quarantine(tmp_path: Path) -> None:
    long = "x" * 100_000
    write_corpus(tmp_path, [row(3, id=long), row(3, id=long, image="images/none.jpg"), *(row(3) for _ in range(10))])
    write_processor(tmp_path)
    manifest = prepare_here(prepare_settings(tmp_path))
    assert (manifest.written, manifest.quarantined) == (11, 1)
    assert ShardedDataset(str(tmp_path / "out")).read(0)["id"] == long
    [bad] = pq.read_table(tmp_path / "out" / "quarantine.parquet").to_pylist()
    assert bad["id"].startswith("xxx") and "characters left out" in bad["id"] and len(bad["id"]) < 1000
    assert all(len(path.read_bytes()) < 20_000 for path in (tmp_path / "out" / "receipts").iterdir())


def test_what_an_error_keeps_of_a_row_can_be_stored() -> None:
    error = RowError("row_malformed", "x" * 399 + "\ud800" * 600, "\udfff\u00e9")
    for each in (error, pickle.loads(pickle.dumps(error))):
        assert (each.id, len(each.detail) <= 700, "\\ud800" in each.detail) == ("\\udfff\u00e9", True, True)
        f"{each.detail}{each.id}{each}".encode()
