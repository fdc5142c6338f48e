"""Storage: whole objects, one winner per name, locally and on a real S3 server."""

from __future__ import annotations

import errno
import os
import sys
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest

from pipelines import storage
from pipelines.storage.states import ObjectFolder
from tests.fixtures.small_disk import SmallDisk


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_uri")


def test_what_is_written_is_read(place: str) -> None:
    uri = storage.join(place, "a", "b.bin")
    assert not storage.exists(uri)
    storage.write_bytes(uri, b"first")
    storage.write_bytes(uri, b"second")
    assert storage.exists(uri)
    assert storage.read_bytes(uri) == b"second"
    assert storage.list_names(storage.join(place, "a")) == ["b.bin"]


def pages(size: int) -> memoryview:
    """Memory that begins at a page, as that of a shard does."""
    memory = np.random.default_rng(size).integers(0, 256, size + 4096, dtype=np.uint8)
    return memory[-memory.ctypes.data % 4096 :][:size].data


@pytest.mark.parametrize("size", [2**20, 2**21 + 123])
@pytest.mark.parametrize("offset", [0, 1], ids=["at a page", "beside a page"])
def test_large_data_is_written_whole_wherever_it_lies(
    tmp_path: Path, small_disk: SmallDisk, size: int, offset: int
) -> None:
    """On the disk of the tests, and on a file system in memory, which not everywhere can do without the page cache."""
    small_disk.resize("8m")
    data = pages(size + offset)[offset:]
    for folder in (tmp_path / "here", small_disk.path):
        storage.write_bytes(str(folder / "shard"), data)
        assert (folder / "shard").read_bytes() == data
        assert [path.name for path in folder.iterdir()] == ["shard"]


def test_a_full_disk_is_named_and_keeps_nothing(small_disk: SmallDisk) -> None:
    path = small_disk.path / "shard"
    with pytest.raises(OSError, match=rf"No space left on device.*{path}"):
        storage.write_bytes(str(path), pages(2**20))
    assert not any(small_disk.path.iterdir())


def test_put_if_absent_keeps_the_first(place: str) -> None:
    uri = storage.join(place, "receipts", "0.json")
    assert storage.put_if_absent(uri, b"first")
    assert not storage.put_if_absent(uri, b"second")
    assert storage.put_if_absent(uri, b"first")  # again: it is there
    assert storage.read_bytes(uri) == b"first"
    assert storage.list_names(storage.join(place, "receipts")) == ["0.json"]


def test_of_many_writers_at_once_one_wins(place: str) -> None:
    for round_number in range(3):
        uri = storage.join(place, f"race-{round_number}")
        values = [f"{number}".encode() * 1000 for number in range(8)]
        with ThreadPoolExecutor(8) as threads:
            won = list(threads.map(lambda value, uri=uri: storage.put_if_absent(uri, value), values))
        assert won.count(True) == 1
        assert storage.read_bytes(uri) == values[won.index(True)]


def test_read_many_keeps_the_order(place: str) -> None:
    uris = [storage.join(place, "many", f"{number}") for number in (2, 0, 1)]
    for uri in uris:
        storage.write_bytes(uri, uri.encode())
    assert storage.read_many(uris) == [uri.encode() for uri in uris]
    assert storage.read_many(uris[:1]) == [uris[0].encode()]
    assert storage.read_many([]) == []


@pytest.mark.parametrize("fault", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_disk_without_hard_links_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: int) -> None:
    def refuse(*_: Any) -> NoReturn:
        raise OSError(fault, os.strerror(fault))

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(OSError, match=rf"no hard links.* use another disk: '{tmp_path}/a'") as raised:
        storage.put_if_absent(f"{tmp_path}/a", b"first")
    assert not isinstance(raised.value, PermissionError)
    assert list(tmp_path.iterdir()) == []


def test_fingerprint_changes_with_the_object(place: str) -> None:
    uri = storage.join(place, "corpus.json")
    storage.write_bytes(uri, b"[1]")
    before = storage.fingerprint(uri)
    assert storage.fingerprint(uri) == before
    storage.write_bytes(uri, b"[2]")
    assert storage.fingerprint(uri) != before


def test_ranges_and_files_read_what_is_there(place: str) -> None:
    uri = storage.join(place, "corpus.jsonl")
    data = bytes(range(256)) * 40
    storage.write_bytes(uri, data)
    assert storage.read_range(uri, 100, 300) == data[100:300]
    assert storage.read_range(uri, len(data) - 3, len(data) + 50) == data[-3:]
    assert storage.read_range(uri, len(data) + 5, len(data) + 50) == b""
    assert storage.read_range(uri, 7, 7) == b""
    with storage.open_file(uri, block_bytes=1000) as file:
        assert file.read() == data
        file.seek(-2, 2)
        assert file.read() == data[-2:]
        file.seek(5000)
        assert file.read(3000) == data[5000:8000]
        assert file.tell() == 8000


def test_what_is_missing_is_named(place: str) -> None:
    uri = storage.join(place, "nothing.bin")
    for read in (storage.read_bytes, storage.fingerprint, lambda uri: storage.read_range(uri, 0, 5)):
        with pytest.raises(FileNotFoundError, match=uri):
            read(uri)
    with pytest.raises(FileNotFoundError, match=uri):
        ObjectFolder(place).read("nothing.bin")


def test_listing_an_absent_folder_is_empty(place: str) -> None:
    assert storage.list_names(storage.join(place, "nothing", "here")) == []


def test_a_store_without_conditional_writes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "plan.json")
    storage.write_bytes(uri, b"{}")
    storage.require_conditional_writes(uri)
    monkeypatch.setattr("pipelines.storage.objects._create", lambda uri, data: True)
    with pytest.raises(storage.StorageError, match=r"plan\.json.*If-None-Match"):
        storage.require_conditional_writes(uri)


def test_parts_are_joined_by_single_slashes() -> None:
    assert storage.join("s3://bucket/a/", "/b/", "c") == "s3://bucket/a/b/c"
    assert storage.join("s3://", "b") == "s3://b"
    assert storage.join("a/b", "c/") == "a/b/c"


def test_local_paths_become_absolute_and_uris_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.resolve("outputs/x") == str(tmp_path / "outputs" / "x")
    assert storage.resolve("s3://bucket/folder/") == "s3://bucket/folder"


def test_a_local_path_may_hold_what_elsewhere_chains_stores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a::b" / "c::d.bin"
    storage.write_bytes("a::b/c::d.bin", b"x")
    assert path.read_bytes() == b"x"
    for uri in (str(path), f"file://{path}", f"local://{path}"):
        assert storage.read_bytes(uri) == b"x"
        assert storage.resolve(uri) == str(path)
        assert storage.match(f"{uri[:-4]}*") == {"c::d.bin": str(path)}


def test_patterns_match_files_in_the_order_of_their_names(place: str) -> None:
    for name in ("b/2.tar", "b/1.tar", "b/1.json", "b/c/3.tar", "4.tar"):
        storage.write_bytes(storage.join(place, "data", name), b"x")
    root = storage.join(place, "data")
    assert storage.is_pattern(f"{root}/b/*.tar") and not storage.is_pattern(root)
    assert storage.match(f"{root}/b/*.tar") == {name: f"{root}/b/{name}" for name in ("1.tar", "2.tar")}
    assert storage.match(f"{root}/?/?.tar") == {name: f"{root}/{name}" for name in ("b/1.tar", "b/2.tar")}
    assert storage.match(f"{root}/**/*.tar").keys() == {"4.tar", "b/1.tar", "b/2.tar", "b/c/3.tar"}
    assert storage.match(f"{root}/b*") == {}  # a folder is no file
    storage.write_bytes(f"{root}/d[1]/5.tar", b"x")
    storage.write_bytes(f"{root}/d1/6.tar", b"x")
    assert storage.match(f"{root}/d[1]/*.tar") == {"5.tar": f"{root}/d[1]/5.tar"}  # no set of letters
    assert storage.match(f"{root}/nowhere/*") == {}
    assert storage.read_bytes(storage.match(f"{root}/?.tar")["4.tar"]) == b"x"


def test_a_folder_is_listed_at_any_depth_and_stamped_as_a_whole(place: str) -> None:
    root = storage.join(place, "folder")
    for name in ("b.jpg", "a/c.jpg", "a.txt"):
        storage.write_bytes(storage.join(root, name), b"x")
    files = storage.list_files(root)
    assert list(files) == ["a.txt", "a/c.jpg", "b.jpg"]
    assert files["b.jpg"] == storage.fingerprint(storage.join(root, "b.jpg"))
    before = storage.folder_fingerprint(files)
    assert before == storage.folder_fingerprint(storage.list_files(root + "/"))
    storage.write_bytes(storage.join(root, "a", "c.jpg"), b"y")
    changed = storage.folder_fingerprint(storage.list_files(root))
    storage.write_bytes(storage.join(root, "a", "d.jpg"), b"x")
    assert len({before, changed, storage.folder_fingerprint(storage.list_files(root))}) == 3
    for folder in (root, root + "/", place):
        with pytest.raises(IsADirectoryError, match=folder):
            storage.fingerprint(folder)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        storage.list_files(storage.join(place, "nowhere"))


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """A file, a link to one, one to a folder of two, one to the whole and one to nowhere."""
    (tmp_path / "blobs" / "more").mkdir(parents=True)
    (tmp_path / "data" / "own").mkdir(parents=True)
    for name in ("data/own/a.jpg", "blobs/b", "blobs/more/c.jpg", "blobs/more/.d.jpg"):
        (tmp_path / name).write_text(name)
    for name, target in (("b.jpg", "../blobs/b"), ("more", "../blobs/more"), ("loop", "."), ("gone.jpg", "nowhere")):
        (tmp_path / "data" / name).symlink_to(target)
    return tmp_path / "data"


def test_a_pattern_matches_links_to_files_too(linked: Path) -> None:
    assert list(storage.match(f"{linked}/*.jpg")) == ["b.jpg", "gone.jpg"]
    assert list(storage.match(f"{linked}/*/*.jpg")) == [
        *("loop/b.jpg", "loop/gone.jpg", "more/.d.jpg", "more/c.jpg", "own/a.jpg"),
    ]
    assert list(storage.match(f"{linked}/**")) == ["b.jpg", "gone.jpg", "own/a.jpg"]
    assert storage.read_bytes(storage.match(f"{linked}/b*")["b.jpg"]) == b"blobs/b"


def test_a_folder_holds_what_its_links_lead_to(linked: Path) -> None:
    files = storage.list_files(str(linked))
    assert list(files) == ["b.jpg", "gone.jpg", "more/.d.jpg", "more/c.jpg", "own/a.jpg"]
    assert files["b.jpg"] == storage.fingerprint(f"{linked}/b.jpg")
    (linked.parent / "blobs" / "b").write_text("blobs/a")  # as many bytes
    os.utime(linked.parent / "blobs" / "b", (1, 1))
    assert storage.list_files(str(linked))["b.jpg"] != files["b.jpg"]


def test_any_other_file_system_of_fsspec_serves_as_well() -> None:
    """The way that gs:// and hf:// take, which cannot be reached from here: nothing but fsspec's own interface."""
    root = "memory://bucket/data"
    for name in ("a.jsonl", "b/c.jsonl"):
        storage.write_bytes(storage.join(root, name), name.encode() * 1000)
    [(name, uri)] = storage.match(f"{root}/*.jsonl").items()
    assert (name, storage.read_bytes(uri)) == ("a.jsonl", b"a.jsonl" * 1000)
    assert list(storage.list_files(root)) == ["a.jsonl", "b/c.jsonl"]
    assert storage.read_range(f"{root}/a.jsonl", 7, 14) == b"a.jsonl"
    assert ObjectFolder(root).read("b/c.jsonl") == (b"b/c.jsonl" * 1000, None)
    with storage.open_file(f"{root}/a.jsonl", block_bytes=100) as file:
        assert file.read() == b"a.jsonl" * 1000
    before = storage.fingerprint(f"{root}/a.jsonl"), storage.list_files(root)
    storage.write_bytes(f"{root}/a.jsonl", b"other")
    after = storage.fingerprint(f"{root}/a.jsonl"), storage.list_files(root)
    assert before[0] != after[0] and before[1] != after[1]


def test_the_hub_is_reached_through_its_own_file_system() -> None:
    file_system, path = storage.filesystem("hf://datasets/user/name@main/data/a.parquet")
    assert (type(file_system).__name__, path) == ("HfFileSystem", "datasets/user/name@main/data/a.parquet")


def test_a_hub_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    uri = "hf://datasets/user/name/a.parquet"
    monkeypatch.setattr(storage.filesystem(uri)[0]._api, "endpoint", "http://127.0.0.1:9")  # nothing listens there
    with pytest.raises(storage.StorageError, match=f"{uri}: no whole answer from the store"):
        storage.fingerprint(uri)


def test_a_protocol_that_nothing_here_knows_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gcsfs", None)  # as where it is not installed
    for protocol in ("gs", "gcs"):
        with pytest.raises(storage.StorageError, match=rf"{protocol}://bucket/a\.json.*'flashsloth\[gcs\]'"):
            storage.filesystem(f"{protocol}://bucket/a.json")
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert extras["optional-dependencies"]["gcs"][0].startswith("gcsfs")
    with pytest.raises(storage.StorageError, match="nowhere://a/b: nothing that is installed knows nowhere://"):
        storage.filesystem("nowhere://a/b")
