"""Parquet of the Hugging Face hub -> records, whatever the row groups."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import storage
from pipelines.corpora import FORMATS
from pipelines.corpora.spans import group
from pipelines.records import FileFormatError
from tests.formats import error, read_rows, records

TURNS = [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]
SPOKEN = pa.struct([("from", pa.dictionary(pa.int32(), pa.string())), ("value", pa.string())])
VIEWED = pa.struct([("from", pa.string_view()), ("value", pa.string_view())])
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


@pytest.mark.parametrize(
    ("field", "turns"),
    [
        ("conversations", {"from": ["human", "gpt"], "value": ["<image>Q", "A"], "weight": None}),
        ("conversations", {"role": ["user", "assistant"], "content": ["<image>Q", "A"]}),
        ("conversations", [{"role": "user", "content": "<image>Q"}, {"role": "assistant", "content": "A"}]),
        (
            "conversations",
            [{"role": "user", "content": "<image>Q", "from": None}, {"role": "assistant", "content": "A"}],
        ),
        ("messages", {"role": ["user", "assistant"], "content": ["<image>Q", "A"]}),
        ("texts", {"user": ["<image>Q"], "assistant": ["A"]}),
    ],
)
def test_other_ways_to_hold_turns(tmp_path: Path, field: str, turns: Any) -> None:
    [record] = records(read_rows("parquet", write(tmp_path, [{"image": b"x", field: turns}])))
    assert [(each["role"], each["content"]) for each in record.messages] == [("user", "Q"), ("assistant", "A")]
    assert record.image == b"x"


def test_typed_content_in_conversations(tmp_path: Path) -> None:
    part = pa.struct([("type", pa.string()), ("text", pa.string()), ("image", IMAGE)])
    turn = pa.struct([("role", pa.string()), ("content", pa.list_(part))])
    question = [{"type": "image", "image": {"bytes": b"x", "path": None}}, {"type": "text", "text": "Q"}]
    turns = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": "A"}]},
    ]
    path = write(tmp_path, [{"conversations": turns}], schema=pa.schema([("conversations", pa.list_(turn))]))
    [record] = records(read_rows("parquet", path))
    assert (record.image, [each["content"] for each in record.messages]) == (b"x", ["Q", "A"])


@pytest.mark.parametrize(
    ("turns", "detail"),
    [
        ({"from": ["human"], "value": ["Q", "A"]}, "a struct of from, value, which are not lists of one length"),
        ({"from": "human", "value": "Q"}, "a struct of from, value, which are not lists of one length"),
        ({"from": None, "value": ["Q"]}, "turn 0 has no 'from'; it has: 'value'"),
        ({"from": None, "value": None}, "'conversations' is a list of turns, this is an empty list"),
        ([{"from": "human", "role": None, "value": "Q"}, {"from": None, "role": "user", "value": "A"}], "no 'from'"),
        ([{"role": "robot", "content": "Q"}], "turn 0 is from 'robot'; known: user"),
    ],
)
def test_turns_that_are_none(tmp_path: Path, turns: Any, detail: str) -> None:
    [bad] = read_rows("parquet", write(tmp_path, [{"id": "r", "conversations": turns}]))
    assert (error(bad).reason, error(bad).id, detail in error(bad).detail) == ("row_malformed", "r", True)


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


@pytest.mark.parametrize("images", [[{"bytes": b"x", "path": None}], [], None])
def test_pairs_of_the_cauldron_are_turns(tmp_path: Path, images: Any) -> None:
    schema = pa.schema(
        [
            ("images", pa.list_(IMAGE)),
            ("texts", pa.list_(pa.struct([(name, pa.string()) for name in ("user", "assistant", "source")]))),
        ]
    )
    pairs = [{"user": f"Q{n}", "assistant": f"A{n}", "source": "vqa"} for n in range(2)]
    [record] = records(read_rows("parquet", write(tmp_path, [{"images": images, "texts": pairs}], schema=schema)))
    assert [each["content"] for each in record.messages] == ["Q0", "A0", "Q1", "A1"]
    assert [each["role"] for each in record.messages] == ["user", "assistant"] * 2
    assert record.image == (b"x" if images else None)


@pytest.mark.parametrize(
    ("change", "reason", "detail"),
    [
        ({"texts": None}, "row_malformed", "'texts' is a list of pairs, this is missing or null"),
        ({"texts": []}, "row_malformed", "'texts' is a list of pairs, this is an empty list"),
        ({"texts": [None]}, "row_malformed", "pair 0 is an object, this is missing or null"),
        (
            {"texts": [{"user": "Q", "assistant": None}]},
            "row_malformed",
            "pair 0: 'assistant' is text, this is missing",
        ),
        ({"texts": [{"user": "Q\0", "assistant": "A"}]}, "row_malformed", "'pair 0' contains a NUL"),
        ({"texts": [{"user": "<image><image>", "assistant": "A"}]}, "image_marker_mismatch", "2 <image> for 1 image"),
        ({"images": [b"x", b"y"]}, "too_many_images", "2 images"),
    ],
)
def test_pairs_that_are_refused(tmp_path: Path, change: dict[str, Any], reason: str, detail: str) -> None:
    good = {"id": "r", "images": [b"x"], "texts": [{"user": "<image>Q", "assistant": "<image>"}]}
    first, bad = read_rows("parquet", write(tmp_path, [good, good | change]))
    assert [each["content"] for each in records([first])[0].messages] == ["Q", "<image>"]
    assert (error(bad).reason, error(bad).id, detail in error(bad).detail) == (reason, "r", True)


@pytest.mark.parametrize("field", ["caption", "text"])
def test_a_caption_is_an_answer_to_an_empty_question(tmp_path: Path, field: str) -> None:
    image = {"bytes": b"x", "path": None}
    rows = [{"image": image, field: " a bar\n"}, {"image": image, field: None}, {"image": None, field: "a bar"}]
    first, second, bad = read_rows("parquet", write(tmp_path, rows))
    told, untold = records([first, second])
    assert [(each["role"], each["content"]) for each in told.messages] == [("user", ""), ("assistant", "a bar")]
    assert (told.image, untold.image, untold.messages) == (b"x", b"x", [])
    assert error(bad).reason == "image_missing"
    [bad] = read_rows("parquet", write(tmp_path, [{"image": image, field: ["one", "two"]}]))
    assert error(bad).detail == f"'{field}' is text, this is a list"


def test_a_conversation_goes_before_a_caption_beside_it(tmp_path: Path) -> None:
    [record] = records(read_rows("parquet", write(tmp_path, [{"image": b"x", "conversations": TURNS, "text": "ocr"}])))
    assert [each["content"] for each in record.messages] == ["Q", "A"]


@pytest.mark.parametrize("other", [{"id": "r", "url": "u", "license": "l", "label": "cat", "split": "train"}, {}])
def test_images_alone_are_there_to_be_annotated(tmp_path: Path, other: dict[str, Any]) -> None:
    rows = [{"image": {"bytes": b"x", "path": None}, "objects": [{"box": [1.0], "label": "cat"}], **other}]
    [record] = records(read_rows("parquet", write(tmp_path, rows)))
    assert (record.image, record.messages) == (b"x", [])


def test_a_struct_of_texts_beside_an_image_is_no_turns(tmp_path: Path) -> None:
    word = pa.dictionary(pa.int32(), pa.string())
    told = pa.array([{"author": "a", "licence": "b"}], pa.struct([("author", word), ("licence", word)]))
    pq.write_table(pa.table({"image": [b"x"], "about": told}), tmp_path / "a.parquet")
    assert records(read_rows("parquet", tmp_path / "a.parquet"))[0].messages == []


@pytest.mark.parametrize(
    "unread",
    [
        {"prompt": "Q", "completion": "A"},
        {"answer": "A"},
        {"Question": "Q", "Answer": "A"},
        {"dialogue": [{"speaker": "a", "words": "Q"}]},
        {"pairs": [{"question": "Q", "answers": ["A", "B"]}]},
        {"talk": pa.array([{"from": ["human"], "value": ["Q"]}])},
        {"talk": pa.array([[{"from": "human", "value": "Q"}]], pa.list_view(SPOKEN))},
        {"talk": pa.array([[{"from": "human", "value": "Q"}]], pa.list_(SPOKEN, 1))},
        {"talk": pa.array([[{"from": "human", "value": "Q"}]], pa.list_(VIEWED))},
        {"conversation": '[{"from": "human"}]'},
        {"dialog": "Q"},
        {"captions": ["A", "B"]},
    ],
)
def test_what_tells_of_an_image_and_is_not_read_is_named(tmp_path: Path, unread: dict[str, Any]) -> None:
    for other in ({}, {"text": "ocr"}):
        row = {"image": {"bytes": b"x", "path": None}, **unread, **other}
        columns = {name: held if isinstance(held, pa.Array) else pa.array([held]) for name, held in row.items()}
        path = tmp_path / "a.parquet"
        pq.write_table(pa.table(columns), path)
        with pytest.raises(FileFormatError, match=f"{path}: has an image, and {', '.join(unread)}, which would not be"):
            read_rows("parquet", path)


@pytest.mark.parametrize("held", [IMAGE, pa.list_(IMAGE), pa.struct([("crop", IMAGE)])])
def test_images_in_columns_that_are_not_read_are_named(tmp_path: Path, held: pa.DataType) -> None:
    fields = [("question", pa.string()), ("image", pa.string()), ("decoded_image", held), ("image_2", held)]
    path = write(tmp_path, [{"question": "Q", "image": "a.jpg"}], schema=pa.schema(fields))
    message = f"{path}: holds images in decoded_image, image_2, and none but those in image or images are read: rename"
    with pytest.raises(FileFormatError, match=message):
        read_rows("parquet", path)


@pytest.mark.parametrize(
    "named",
    [
        *({"image_url": "https://a/b.jpg"}, {"image_path": "b.jpg"}, {"imagePath": "b.jpg"}, {"img": b"x"}),
        *({"jpg": b"x"}, {"Image": b"x"}, {"image_bytes": [b"x"]}, {"picture": {"bytes": b"x"}}, {"photos": ["b.jpg"]}),
        *({"image_1": "b.jpg"}, {"image_file_name": "b.jpg"}, {"imageSrc": "b.jpg"}, {"decodedImage": b"x"}),
    ],
)
@pytest.mark.parametrize("text", ["question", "messages", "texts"])
def test_an_image_under_another_name_makes_no_row_of_text(tmp_path: Path, named: dict[str, Any], text: str) -> None:
    turns = {"messages": [{"role": "user", "content": "Q"}], "texts": [{"user": "Q", "assistant": "A"}]}
    row = {text: turns.get(text, "Q"), "image_sha256": "ab", "image_width": 5, "digest": b"y"}
    assert len(records(read_rows("parquet", write(tmp_path, [row])))) == 1
    path = write(tmp_path, [{**row, **named}])
    with pytest.raises(FileFormatError, match=f"{path}: has no image or images, but {next(iter(named))}, which would"):
        read_rows("parquet", path)


@pytest.mark.parametrize(
    ("name", "held"),
    [
        ("img", pa.dictionary(pa.int32(), pa.binary())),
        ("frame", pa.struct([("bytes", pa.binary())])),
        ("frames", pa.list_(pa.struct([("bytes", pa.string()), ("format", pa.string())]))),
    ],
)
def test_other_ways_to_hold_bytes_make_no_row_of_text(tmp_path: Path, name: str, held: pa.DataType) -> None:
    pq.write_table(pa.table({"question": ["Q"], name: pa.nulls(1, held)}), tmp_path / "a.parquet")
    with pytest.raises(FileFormatError, match=f"has no image or images, but {name}, which would not be read"):
        read_rows("parquet", tmp_path / "a.parquet")


@pytest.mark.parametrize(
    "other",
    [
        *({"image_id": "7"}, {"has_image": "no"}, {"image_size": [4, 3]}, {"image_caption": "a bar"}),
        *({"embedding": b"x"}, {"file": {"bytes": 7, "sha": "ab"}}),
    ],
)
def test_what_is_no_image_may_stand_beside_text(tmp_path: Path, other: dict[str, Any]) -> None:
    [record] = records(read_rows("parquet", write(tmp_path, [{"question": "Q", "answer": "A", **other}])))
    assert record.image is None


@pytest.mark.parametrize("name", ["image", "url", "path", "image_url"])
@pytest.mark.parametrize("field", ["messages", "conversations"])
def test_a_former_name_may_stand_beside_content_that_has_the_image(tmp_path: Path, field: str, name: str) -> None:
    kind = "image_url" if name == "image_url" else "image"
    part = pa.struct([(column, pa.string()) for column in ("type", "text", name)])
    turns = pa.list_(pa.struct([("role", pa.string()), ("content", pa.list_(part))]))
    content = [{"type": kind, name: "a.jpg"}, {"type": "text", "text": "Q"}]
    row = {field: [{"role": "user", "content": content}], "image_path": "before/a.jpg"}
    path = write(tmp_path, [row], schema=pa.schema([(field, turns), ("image_path", pa.string())]))
    assert records(read_rows("parquet", path))[0].image == "a.jpg"


def test_two_fields_of_one_name_in_a_turn_are_refused(tmp_path: Path) -> None:
    fields = [pa.array(["human"]), pa.array(["Q"]), pa.array(["A"])]
    turns = pa.StructArray.from_arrays(fields, names=["from", "value", "value"])
    table = pa.table({"conversations": pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), turns)})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(FileFormatError, match=r"a\.parquet: two fields in conversations have one name, of which one"):
        read_rows("parquet", tmp_path / "a.parquet")


def test_a_file_with_fewer_rows_than_before_is_named(tmp_path: Path) -> None:
    path = write(tmp_path, [{"question": "Q"}] * 12)
    *_, last = group(FORMATS["parquet"].scan(str(path)), 4)
    write(tmp_path, [{"question": "Q"}] * 4)
    with pytest.raises(FileFormatError, match=r"\.parquet: has 4 rows, and none from 8 on"):
        list(FORMATS["parquet"].read(str(path), last))


@pytest.mark.parametrize("columns", [("conversations", "messages"), ("messages", "texts"), ("caption", "text")])
def test_two_columns_of_which_one_would_be_lost(tmp_path: Path, columns: tuple[str, str]) -> None:
    path = write(tmp_path, [{"image": b"x"} | dict.fromkeys(columns, "x")])
    with pytest.raises(FileFormatError, match=f"has {columns[0]} and {columns[1]}, of which one would be lost"):
        read_rows("parquet", path)


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
