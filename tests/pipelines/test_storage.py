"""Storage: whole objects, one winner per name, locally and on a real S3 server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines import storage


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
        storage.read_below(place, "nothing.bin")


def test_listing_an_absent_folder_is_empty(place: str) -> None:
    assert storage.list_names(storage.join(place, "nothing", "here")) == []


def test_a_store_without_conditional_writes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = str(tmp_path / "plan.json")
    storage.write_bytes(uri, b"{}")
    storage.require_conditional_writes(uri)
    monkeypatch.setattr(storage, "_create", lambda uri, data: True)
    with pytest.raises(storage.StorageError, match=r"plan\.json.*If-None-Match"):
        storage.require_conditional_writes(uri)


def test_local_paths_become_absolute_and_uris_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert storage.resolve("outputs/x") == str(tmp_path / "outputs" / "x")
    assert storage.resolve("s3://bucket/folder/") == "s3://bucket/folder"
