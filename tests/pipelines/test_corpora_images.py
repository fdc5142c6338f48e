"""A folder of images -> rows that an annotation fills."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipelines import storage
from pipelines.corpora import images
from pipelines.preparation.chunks import index_files, read_chunk
from pipelines.preparation.settings import PrepareSettings, SourceSettings
from pipelines.preparation.sources import PlanError, source_terms
from pipelines.records import Record
from pipelines.storage.states import ObjectFolder
from tests.formats import error, read_rows, records

NAMES = ["a/0.JPG", "a/b/1.webp", "a/b/2.tiff", "c.png"]


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.s3)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    root = str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_uri")
    for name in (*NAMES, "a/notes.txt", "index.json"):
        storage.write_bytes(storage.join(root, "photos", name), name.encode())
    return storage.join(root, "photos")


def test_every_image_at_any_depth_is_a_row(folder: str) -> None:
    found = read_rows("images", folder)
    assert [row.location for row in found] == [storage.join(folder, name) for name in NAMES]
    assert records(found) == [Record([], id=name, image=name) for name in NAMES]
    assert ObjectFolder(folder).read(NAMES[1])[0] == NAMES[1].encode()


def test_the_folder_is_the_image_root(folder: str) -> None:
    source = SourceSettings(path=folder, format="images")
    assert (source.image_root, source.name) == (folder, "photos")


def test_a_folder_is_listed_once_and_again_where_it_has_changed(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    listed: list[str] = []
    list_files = storage.list_files
    [source] = source_terms([SourceSettings(path=folder, format="images")])
    monkeypatch.setattr(storage, "list_files", lambda path: listed.append(path) or list_files(path))  # type: ignore[func-returns-value]
    chunks = index_files(range(1), [source], [folder], chunk_rows=1)
    assert [read_chunk(source, folder, chunk)[0].content for chunk in chunks] == [
        Record([], id=name, image=name) for name in NAMES
    ]
    assert listed == [folder]
    storage.write_bytes(storage.join(folder, "a/9.jpg"), b"x")
    [new] = source_terms([SourceSettings(path=folder, format="images")])
    [first, *_] = index_files(range(1), [new], [folder], chunk_rows=3)
    assert [row.position for row in read_chunk(new, folder, first)] == [0, 1, 2]
    with pytest.raises(PlanError, match="photos has changed since the plan was made"):
        read_chunk(source, folder, chunks[1])


def test_another_process_sees_the_change_too(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    [source] = source_terms([SourceSettings(path=folder, format="images")])
    chunks = index_files(range(1), [source], [folder], chunk_rows=2)
    storage.write_bytes(storage.join(folder, "a/0.JPG"), b"other bytes")
    monkeypatch.setattr(images, "_listings", {})
    with pytest.raises(PlanError, match="photos has changed since the plan was made"):
        read_chunk(source, folder, chunks[0])


def test_other_files_may_come_and_go(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    [source] = source_terms([SourceSettings(path=folder, format="images")])
    chunks = index_files(range(1), [source], [folder], chunk_rows=2)
    storage.write_bytes(storage.join(folder, "a/.DS_Store"), b"of a file manager")
    storage.write_bytes(storage.join(folder, "index.json"), b"another one")
    monkeypatch.setattr(images, "_listings", {})
    assert [row.position for row in read_chunk(source, folder, chunks[1])] == [2, 3]
    assert source_terms([SourceSettings(path=folder, format="images")]) == [source]


def test_a_name_that_cannot_be_written_down(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"x")
    with open(os.fsencode(tmp_path) + b"/b\xff.jpg", "wb") as file:
        file.write(b"x")
    (tmp_path / "c\n.jpg").write_bytes(b"x")
    first, second, third = read_rows("images", tmp_path)
    assert records([first])[0].image == "a.jpg"
    assert error(second).reason == error(third).reason == "row_malformed"
    second.location.encode(errors="strict")  # it gets into the quarantine's table


def test_preparing_a_folder_of_images_is_refused(tmp_path: Path) -> None:
    source = {"path": str(tmp_path), "format": "images", "name": "photos"}
    with pytest.raises(ValueError, match="source 'photos': a folder of images has no conversations"):
        PrepareSettings(sources=[source], output="out", processor="p")
