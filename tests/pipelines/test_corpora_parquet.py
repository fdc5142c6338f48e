"""Parquet of the Hugging Face hub -> records, whatever the row groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.records import FileFormatError
from tests.formats import error, read_rows, records

TURNS = [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write(folder: Path, rows: list[dict[str, Any]], row_group_size: int = 3, schema: pa.Schema | None = None) -> Path:
    path = folder / "train-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=row_group_size)
    return path


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 100])
@pytest.mark.parametrize("row_group_size", [1, 3, 50])
def test_rows_are_found_in_their_row_groups(tmp_path: Path, chunk: int, row_group_size: int) -> None:
    rows = [
        {"id": f"r{n}", "image": {"bytes": b"image %d" % n, "path": f"{n}.jpg"}, "conversations": TURNS, "score": n}
        for n in range(7)
    ]
    path = write(tmp_path, rows, row_group_size)
    found = read_rows("parquet", path, chunk)
    assert [row.location for row in found] == [f"{path} (row {n})" for n in range(7)]
    assert [(each.id, each.image) for each in records(found)] == [(f"r{n}", b"image %d" % n) for n in range(7)]
    assert records(found)[0].messages == [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


def test_more_rows_than_a_batch_in_one_row_group(tmp_path: Path) -> None:
    rows = [{"id": n, "conversations": [{"from": "human", "value": "Q"}, TURNS[1]]} for n in range(100)]
    found = records(read_rows("parquet", write(tmp_path, rows, 100), rows=33))
    assert [each.id for each in found] == [str(n) for n in range(100)]


def test_ways_to_hold_an_image(tmp_path: Path) -> None:
    images: list[Any] = [
        {"bytes": None, "path": "a/1.jpg"},
        {"bytes": b"x", "path": None},
        None,
    ]
    rows = [
        {"image": image, "conversations": TURNS if image else [{"from": "human", "value": "Q"}, TURNS[1]]}
        for image in images
    ]
    assert [each.image for each in records(read_rows("parquet", write(tmp_path, rows)))] == ["a/1.jpg", b"x", None]
    rows = [{"images": [{"bytes": b"x", "path": None}], "conversations": TURNS}]
    assert records(read_rows("parquet", write(tmp_path, rows)))[0].image == b"x"
    rows = [{"image": b"x", "conversations": TURNS}]
    assert records(read_rows("parquet", write(tmp_path, rows)))[0].image == b"x"


def test_chat_messages_with_typed_content(tmp_path: Path) -> None:
    part = pa.struct([("type", pa.string()), ("text", pa.string())])
    turn = pa.struct([("role", pa.string()), ("content", pa.list_(part))])
    schema = pa.schema([("messages", pa.list_(turn)), ("images", pa.list_(IMAGE))])
    question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A"}]}
    row = {"messages": [question, answer], "images": [{"bytes": b"x", "path": None}]}
    [record] = records(read_rows("parquet", write(tmp_path, [row], schema=schema)))
    assert (record.image, record.messages[1]["content"]) == (b"x", "A")


def test_an_image_within_typed_content(tmp_path: Path) -> None:
    part = pa.struct([("type", pa.string()), ("text", pa.string()), ("image", IMAGE)])
    schema = pa.schema([("messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(part))])))])
    images = [{"bytes": b"x", "path": None}, {"bytes": None, "path": "a.jpg"}, {"bytes": b"", "path": None}]
    lost = {"bytes": None, "path": None}
    text = {"type": "text", "text": "Q", "image": lost}  # as some tools write a part without one
    answer = {"role": "assistant", "content": [{"type": "text", "text": "A"}]}
    rows = [
        {"messages": [{"role": "user", "content": [{"type": "image", "image": image}, text]}, answer]}
        for image in (*images, lost)
    ]
    *good, bad = read_rows("parquet", write(tmp_path, rows, schema=schema))
    assert [each.image for each in records(good)] == [b"x", "a.jpg", b""]
    assert error(bad).reason == "image_missing"


def test_a_row_about_a_sound_is_no_row_of_text(tmp_path: Path) -> None:
    rows = [{"question": "Q", "audio": {"bytes": b"RIFF", "path": None}}, {"question": "Q", "audio": None}]
    bad, text = read_rows("parquet", write(tmp_path, rows))
    assert (error(bad).reason, records([text])[0].image) == ("media_not_supported", None)


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["Q"]), pa.array(["A"]), pa.array(["B"])], ["question", "answer", "answer"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(FileFormatError, match=r"a\.parquet: has two columns 'answer'"):
        read_rows("parquet", tmp_path / "a.parquet")


def test_a_bad_row_between_good_ones(tmp_path: Path) -> None:
    good = {"id": "g", "image": {"bytes": b"x", "path": "a"}, "conversations": TURNS}
    bad = {"id": "b", "image": {"bytes": None, "path": None}, "conversations": TURNS}
    empty = {"id": "e", "image": {"bytes": b"", "path": "a"}, "conversations": TURNS}  # its bytes are looked at later
    none = {"id": "n", "image": good["image"], "conversations": None}
    first, second, third, fourth, last = read_rows("parquet", write(tmp_path, [good, bad, empty, none, good]))
    assert [each.image for each in records([first, third, last])] == [b"x", b"", b"x"]
    assert (error(second).reason, error(second).id) == ("image_missing", "b")
    assert (error(fourth).reason, error(fourth).id) == ("row_malformed", "n")


@pytest.mark.parametrize(
    ("image", "fields"),
    [
        ({"bytes": None, "path": None}, "bytes, path"),
        ({"bytes": None, "path": ""}, "bytes, path"),
        ({"url": "http://host/a.jpg"}, "url"),
    ],
)
def test_a_struct_without_an_image_is_no_row_of_text(tmp_path: Path, image: dict[str, Any], fields: str) -> None:
    schema = pa.schema([("image", pa.struct([(name, pa.string()) for name in image])), ("question", pa.string())])
    rows = [{"image": image, "question": "Q"}, {"image": None, "question": "Q"}]
    bad, text = read_rows("parquet", write(tmp_path, rows, schema=schema))
    assert (error(bad).reason, error(bad).detail) == (
        "image_missing",
        f"the image is a struct ({fields}) without bytes and path",
    )
    assert records([text])[0].image is None
    listed = [{"images": [image], "question": "Q"}]
    [bad] = read_rows("parquet", write(tmp_path, listed))
    assert error(bad).reason == "image_missing"


def test_text_that_is_no_utf_8(tmp_path: Path) -> None:
    turns = pa.list_(pa.struct([("from", pa.binary()), ("value", pa.binary())]))
    spelled = [{"from": b"human", "value": b"Q\xff"}, {"from": b"gpt", "value": b"A"}]
    table = pa.Table.from_pylist([{"conversations": spelled}], schema=pa.schema([("conversations", turns)]))
    text = pa.list_(pa.struct([("from", pa.string()), ("value", pa.string())]))
    path = tmp_path / "a.parquet"
    pq.write_table(table.cast(pa.schema([("conversations", text)]), safe=False), path)
    [row] = read_rows("parquet", path)
    assert error(row).detail.startswith("not UTF-8: byte 0xff")


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, [{"conversations": TURNS, "image": {"bytes": bytes(5000), "path": "a"}}])
    data = path.read_bytes()
    for name, content, message in (
        ("cut", data[: len(data) // 2], "no Parquet file"),
        ("text", b"hello", "no Parquet file"),
        ("empty", b"", "no Parquet file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(FileFormatError, match=f"{tmp_path}/{name}: {message}"):
            read_rows("parquet", tmp_path / name)
    pq.write_table(pa.table({"title": ["Q"]}), path)
    with pytest.raises(FileFormatError, match="or image alone"):
        read_rows("parquet", path)
    with pytest.raises(FileFormatError, match="has the columns title; one of conversations, messages and question"):
        read_rows("parquet", path)


def test_a_page_that_is_damaged_stops_the_chunk_with_the_file(tmp_path: Path) -> None:
    rows = [{"conversations": TURNS, "image": {"bytes": bytes([n]) * 5000, "path": "a"}} for n in range(6)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3, compression="zstd")
    data = bytearray(path.read_bytes())
    start = pq.ParquetFile(path).metadata.row_group(0).column(0).data_page_offset
    data[start : start + 60] = b"\xff" * 60
    path.write_bytes(data)
    with pytest.raises(FileFormatError, match=f"{path}: rows 0 to 2: "):
        read_rows("parquet", path)


@pytest.mark.s3
def test_rows_on_s3(tmp_path: Path, s3_uri: str) -> None:
    rows = [{"image": {"bytes": bytes([n]) * 300_000, "path": "a"}, "conversations": TURNS} for n in range(5)]
    uri = storage.join(s3_uri, "a.parquet")
    storage.write_bytes(uri, write(tmp_path, rows).read_bytes())
    assert [each.image for each in records(read_rows("parquet", uri))] == [bytes([n]) * 300_000 for n in range(5)]
