"""WebDataset tars -> records, and tars that are broken."""

from __future__ import annotations

import io
import json
import subprocess
import tarfile
from pathlib import Path
from typing import Any

import pytest

from pipelines import storage
from pipelines.records import FileFormatError
from tests.formats import error, read_rows, records

TURNS = [{"from": "human", "value": "<image>Q"}, {"from": "gpt", "value": "A"}]


def write(path: Path, files: dict[str, bytes | dict[str, Any]], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in files.items():
            data = json.dumps(content).encode() if isinstance(content, dict) else content
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


@pytest.mark.parametrize("chunk", [1, 2, 100])
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_files_of_a_sample_make_a_record(tmp_path: Path, chunk: int, form: int) -> None:
    files: dict[str, bytes | dict[str, Any]] = {}
    for number in range(5):
        files[f"a/{number:05}.JPG"] = b"image %d" % number * 1000
        files[f"a/{number:05}.json"] = {"conversations": TURNS} | ({"id": f"own{number}"} if number % 2 else {})
    path = write(tmp_path / "0.tar", files, form)
    found = read_rows("webdataset", path, chunk)
    assert [row.location for row in found] == [f"{path}:a/{n:05} (sample {n})" for n in range(5)]
    assert [each.image for each in records(found)] == [b"image %d" % n * 1000 for n in range(5)]
    assert [each.id for each in records(found)] == ["a/00000", "own1", "a/00002", "own3", "a/00004"]
    assert records(found)[0].messages[0]["content"] == "Q"


def test_captions_messages_and_text_alone(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Q"}]}]
    path = write(
        tmp_path / "0.tar",
        {
            "0.jpg": b"0",
            "0.txt": b"\xef\xbb\xbfa red square\n",
            "1.png": b"1",
            "1.json": {"caption": "a bar", "key": "1", "image": "http://elsewhere/1.png"},
            "2.webp": b"2",
            "2.json": {"messages": [*messages, {"role": "assistant", "content": "A"}]},
            "3.json": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        },
    )
    first, second, third, fourth = records(read_rows("webdataset", path))
    assert [message["content"] for message in first.messages] == ["", "a red square"]
    assert (second.image, second.messages[1]["content"]) == (b"1", "a bar")
    assert (third.image, third.messages[0]["content"]) == (b"2", "Q")
    assert (fourth.image, len(fourth.messages)) == (None, 2)


@pytest.mark.parametrize("text", [{"question": "Q", "answer": "A"}, {"texts": [{"user": "Q", "assistant": "A"}]}])
def test_questions_go_before_a_caption_beside_them(tmp_path: Path, text: dict[str, Any]) -> None:
    files = {"0.jpg": b"0", "0.txt": b"alt", "0.json": text, "1.jpg": b"1", "1.json": {**text, "caption": "alt"}}
    found = records(read_rows("webdataset", write(tmp_path / "0.tar", {**files, "2.json": text})))
    assert [[message["content"] for message in record.messages] for record in found] == [["Q", "A"]] * 3
    assert [record.image for record in found] == [b"0", b"1", None]


@pytest.mark.parametrize("field", ["image", "path", "url"])
def test_what_a_part_calls_its_image_is_a_name_from_before_the_tar(tmp_path: Path, field: str) -> None:
    part = {"type": "image", field: "train/coco/1.jpg"}
    question = {"role": "user", "content": [part, {"type": "text", "text": "Q"}]}
    row = {"messages": [question, {"role": "assistant", "content": "A"}]}
    path = write(tmp_path / "0.tar", {"0.jpg": b"the image", "0.json": row, "1.json": row})
    beside, alone = records(read_rows("webdataset", path))
    assert beside.image == b"the image"
    assert alone.image == "train/coco/1.jpg"  # no image is in the tar: there may be one below an image root


def test_an_image_of_another_kind_is_no_row_of_text(tmp_path: Path) -> None:
    files: dict[str, bytes | dict[str, Any]] = {"0.avif": b"x", "0.txt": b"t", "1.JFIF": b"y", "1.txt": b"t"}
    files |= {"2.ppm": b"z", "2.txt": b"t"}
    rows = records(read_rows("webdataset", write(tmp_path / "0.tar", files)))
    assert [each.image for each in rows] == [b"x", b"y", b"z"]


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_name_that_is_no_utf_8_is_spelled_so_that_it_can_be_stored(tmp_path: Path, form: int) -> None:
    files = {
        "0.jpg": b"0",
        "0.txt": b"a",
        "caf\udce9.jpg": b"1",
        "caf\udce9.txt": b"b",
        "café.jpg": b"2",
        "café.txt": b"c",
    }
    path = tmp_path / "0.tar"
    with tarfile.open(path, "w", format=form, errors="surrogateescape") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    found = read_rows("webdataset", path, 2)
    assert [row.location for row in found] == [
        f"{path}:{name} (sample {n})" for n, name in enumerate(["0", r"caf\xe9", "café"])
    ]
    assert [(each.id, each.image) for each in records(found)] == [("0", b"0"), (r"caf\xe9", b"1"), ("café", b"2")]


def test_folders_long_names_and_odd_dots(tmp_path: Path) -> None:
    long = "x" * 200
    path = tmp_path / "0.tar"
    write(path, {f"./{long}/a.b.jpg": b"1", f"./{long}/a.json": {"conversations": TURNS}, "./c.d/a.txt": b"t"})
    with tarfile.open(path, "a") as tar:
        folder = tarfile.TarInfo("./d")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    first, second = read_rows("webdataset", path, 1)
    assert first.location.endswith(f":{long}/a (sample 0)")
    assert records([first])[0].image == b"1"  # a.b.jpg is the sample's "b.jpg"
    assert (second.location.endswith(":c.d/a (sample 1)"), records([second])[0].messages[1]["content"]) == (True, "t")


@pytest.mark.parametrize("image", ["image.png", "input.JPG", "0.jpg", "a.b.webp"])
def test_a_file_is_what_its_name_ends_in(tmp_path: Path, image: str) -> None:
    turns = {"conversations": TURNS}
    files: dict[str, bytes | dict[str, Any]] = {f"0.{image}": b"0", "0.turns.json": turns}
    files |= {f"1.{image}": b"1", "1.caption.txt": b"a bar"}
    files |= {f"2.{image}": b"2", "2.json": turns, "2.metadata.json": {"width": 3}, "2.mask.bin": b"?", "2.cls": b"3"}
    first, second, third = records(read_rows("webdataset", write(tmp_path / "0.tar", files)))
    assert [each.image for each in (first, second, third)] == [b"0", b"1", b"2"]
    assert [each.messages[1]["content"] for each in (first, second, third)] == ["A", "a bar", "A"]


@pytest.mark.parametrize(("field", "held"), [("image", "a/1.jpg"), ("images", ["a/1.jpg"])])
def test_an_image_that_a_json_names_and_that_is_not_in_the_tar_is_looked_for_elsewhere(
    tmp_path: Path, field: str, held: Any
) -> None:
    asked = {"messages": [{"role": "user", "content": [{"type": "image"}]}, {"role": "assistant", "content": "A"}]}
    rows = [{field: held} | text for text in ({"conversations": TURNS}, {"caption": "a bar"}, asked)]
    files: dict[str, bytes | dict[str, Any]] = {f"{number}.json": row for number, row in enumerate(rows)}
    found = records(read_rows("webdataset", write(tmp_path / "0.tar", files)))
    assert [each.image for each in found] == ["a/1.jpg"] * 3


def test_numbers_and_arrays_are_no_text_of_an_image_and_numbers_no_image_of_a_text(tmp_path: Path) -> None:
    files = {"0.jpg": b"0", "0.cls": b"3", "0.clip.npy": b"array", "1.txt": b"t", "1.cls": b"3"}
    first, second = records(read_rows("webdataset", write(tmp_path / "0.tar", files)))
    assert (first.image, first.messages) == (b"0", [])
    assert (second.image, second.messages[1]["content"]) == (None, "t")


def test_files_that_belong_to_no_sample_are_passed_over(tmp_path: Path) -> None:
    sample = {"a/0.jpg": b"x", "a/0.json": {"conversations": TURNS}}
    odd = {"README": b"hello", "a/._0.jpg": b"of macOS", "a/._0.json": b"of macOS", ".hidden/1.txt": b"t"}
    names = ["README", "a/._0.jpg", "a/0.jpg", "a/._0.json", "a/0.json", ".hidden/1.txt"]
    path = write(tmp_path / "0.tar", {name: (sample | odd)[name] for name in names})
    first, second = records(read_rows("webdataset", path, 1))
    assert (first.id, first.image, second.id, second.image) == ("a/0", b"x", ".hidden/1", None)


@pytest.mark.parametrize(
    ("files", "reason", "detail"),
    [
        ({"0.cls": b"3"}, "row_malformed", "has cls, but neither a json"),
        ({"0.jpg": b"x", "0.json": {"caption": 3}}, "row_malformed", "has jpg, json, but neither a json"),
        ({"0.jpg": b"x", "0.json": b"{"}, "row_malformed", "not valid JSON"),
        ({"0.jpg": b"x", "0.json": b"[]"}, "row_malformed", "a row is an object, this is an empty list"),
        ({"0.jpg": b"x", "0.txt": b"\xff"}, "row_malformed", "the txt is not UTF-8"),
        ({"0.jpg": b"x", "0.txt": b"\0"}, "row_malformed", "NUL"),
        ({"0.jpg": b"x", "0.png": b"x", "0.txt": b"t"}, "too_many_images", "2 images"),
        ({"0.json": {"conversations": TURNS}}, "image_marker_mismatch", "1 <image> for 0 image(s)"),
        ({"0.jpg": b"x", "0.json": {"caption": "a"}, "0.JSON": b"{}"}, "row_malformed", "has two files json"),
        ({"0.jpg": b"x", "0.txt": b"t", "0.b.txt": b"u"}, "row_malformed", "has two files txt (txt, b.txt)"),
        ({"0.0.jpg": b"x", "0.1.jpg": b"x", "0.txt": b"t"}, "too_many_images", "2 images"),
        ({"0.json": {"caption": "a", "images": ["a.jpg", "b.jpg"]}}, "too_many_images", "2 images"),
        ({"0.txt": b"t", "0.raw": b"x"}, "row_malformed", "has no image, which would end in jpg, png, webp and the"),
        ({"0.txt": b"t", "0.jpg.gz": b"x"}, "row_malformed", "and the like, but jpg.gz, which is not read"),
        ({"0.txt": b"t", "0.npy": b"x"}, "row_malformed", "but npy, which is not read"),
        ({"0.json": {"conversations": TURNS}, "0.pyd": b"x"}, "row_malformed", "but pyd, which is not read"),
        ({"0.jpg": b"x", "0.text": b"t"}, "row_malformed", "has no text, which would end in json or txt, but text,"),
        ({"0.mp4": b"x", "0.txt": b"t"}, "media_not_supported", "has mp4 and no image"),
        ({"0.video.mp4": b"x", "0.txt": b"t"}, "media_not_supported", "has video.mp4 and no image"),
        ({"0.jpg": b"x", "0.json": {"conversations": TURNS, "audio": "a"}}, "media_not_supported", "has 'audio'"),
    ],
)
def test_what_is_refused_harms_no_neighbour(tmp_path: Path, files: Any, reason: str, detail: str) -> None:
    path = write(tmp_path / "0.tar", {**files, "1.jpg": b"y", "1.txt": b"fine"})
    bad, good = read_rows("webdataset", path)
    assert (error(bad).reason, detail in error(bad).detail) == (reason, True)
    assert records([good])[0].image == b"y"


@pytest.mark.parametrize("chunk", [1, 2, 100])
@pytest.mark.parametrize("form", ["gnu", "posix"])
def test_a_file_without_its_holes_is_refused_and_harms_no_neighbour(tmp_path: Path, chunk: int, form: str) -> None:
    for number in range(5):
        (tmp_path / f"{number}.jpg").write_bytes(b"image %d" % number)
        (tmp_path / f"{number}.txt").write_text(f"caption {number}")
    for name in ("1.jpg", "3.jpg", "4.bin"):  # the last is not read
        with (tmp_path / name).open("wb") as file:
            file.write(b"x" * 20_000)
            file.seek(2_000_000)
            file.write(b"y" * 20_000)
    path = tmp_path / "0.tar"
    names = sorted(each.name for each in tmp_path.iterdir())
    how = ["--sparse", f"--format={form}"]
    subprocess.run(["tar", *how, "-cf", str(path), "-C", str(tmp_path), *names], check=True)
    assert path.stat().st_size < 2_000_000
    rows = read_rows("webdataset", path, chunk)
    assert [each.image for each in records(rows[0::2])] == [b"image 0", b"image 2", b"image 4"]
    assert [each.messages[1]["content"] for each in records(rows[0::2])] == ["caption 0", "caption 2", "caption 4"]
    assert [error(row).reason for row in rows[1::2]] == ["image_not_a_file"] * 2
    assert "without --sparse" in error(rows[1]).detail


def link(name: str, target: str, kind: bytes = tarfile.LNKTYPE, size: int = 0) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, target, size
    return member


@pytest.mark.parametrize("chunk", [1, 2, 100])
@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_sample_with_a_link_is_refused_and_counted(tmp_path: Path, chunk: int, form: int) -> None:
    path = tmp_path / "0.tar"
    members: list[tuple[str, bytes] | tarfile.TarInfo] = [
        *(("0.jpg", b"x"), ("0.txt", b"t")),
        *(link("1.jpg", "0.jpg", size=1), ("1.txt", b"t")),  # some packers tell the other file's size
        *(link("2.jpg", "0.jpg", tarfile.SYMTYPE), ("2.json", b'{"id": "own", "caption": "t"}')),
        *(("3.jpg", b"x"), link("3.txt", "0.txt", size=1)),
        *(("4.jpg", b"x"), link("4.json", "0.json")),
        *(link("5.jpg", "é" * 150 + ".jpg"), link("5.txt", "0.txt")),
        *(("6.jpg", b"x"), ("6.txt", b"t"), link("6.cls", "0.cls", size=1)),  # which is not read
        link("latest", "6", tarfile.SYMTYPE),
    ]
    with tarfile.open(path, "w", format=form) as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
            else:
                file = tarfile.TarInfo(member[0])
                file.size = len(member[1])
                tar.addfile(file, io.BytesIO(member[1]))
    first, *bad, last = read_rows("webdataset", path, chunk)
    assert [each.image for each in records([first, last])] == [b"x", b"x"]
    assert [(error(row).reason, error(row).id) for row in bad] == [
        *(("image_not_a_file", "1"), ("image_not_a_file", "own")),
        *(("row_malformed", "3"), ("row_malformed", "4"), ("image_not_a_file", "5")),
    ]
    for row, name, remedy in ((bad[0], "1.jpg", "--hard-dereference"), (bad[1], "2.jpg", "--dereference")):
        assert error(row).detail == f"{name} is a link to 0.jpg, not a file in the tar; pack it with tar {remedy}"


def test_tars_that_are_broken_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "0.tar", {f"{n}.txt": b"x" * 3000 for n in range(6)})
    data = path.read_bytes()
    third = data.index(b"3.txt")
    for content, message in (
        (data[: third + 700], "0.tar: no tar, or a damaged one: unexpected end"),
        (data[:third], r"0\.tar: ends at byte \d+ without a tar's end mark: it is cut short"),
        (data[:third] + b"#" * 512 + data[third + 512 :], r"0\.tar: damaged near byte \d+: neither a file nor the end"),
        (with_size(data, third, b"\x80" + b"\xff" * 11), "0.tar: no tar, or a damaged one"),
        (with_size(data, third, b"\x80" + bytes(3) + b"\x7f" + b"\xff" * 7), "0.tar: no tar, or a damaged one"),
        (b"hello" * 300, "0.tar: no tar, or a damaged one.*compressed ones must be unpacked"),
        (b"\x1f\x8b" + bytes(2000), "compressed ones must be unpacked"),
    ):
        path.write_bytes(content)
        with pytest.raises(FileFormatError, match=message):
            read_rows("webdataset", path)


def with_size(tar: bytes, start: int, size: bytes) -> bytes:
    """`tar`, in which the header at `start` tells another size, and is whole."""
    head = bytearray(tar[start : start + 512])
    head[124:136], head[148:156] = size, b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return tar[:start] + bytes(head) + tar[start + 512 :]


def test_an_empty_tar_holds_no_rows(tmp_path: Path) -> None:
    assert read_rows("webdataset", write(tmp_path / "0.tar", {})) == []


@pytest.mark.s3
def test_samples_on_s3(tmp_path: Path, s3_uri: str) -> None:
    files: dict[str, bytes | dict[str, Any]] = {}
    for number in range(4):
        files |= {f"{number}.jpg": bytes([number]) * 100_000, f"{number}.json": {"conversations": TURNS}}
    uri = storage.join(s3_uri, "0.tar")
    storage.write_bytes(uri, write(tmp_path / "0.tar", files).read_bytes())
    assert [each.image for each in records(read_rows("webdataset", uri))] == [bytes([n]) * 100_000 for n in range(4)]
