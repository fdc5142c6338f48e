"""Images that rows name by their paths: pinned as they are when the plan is made, and an error where one is another."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.prepare import main
from pipelines import storage
from pipelines.preparation.chunks import Chunk, index_files
from pipelines.preparation.image_pins import ImagePins, image_hash
from pipelines.preparation.pinning import find_pins, list_images, named_images, stretches
from pipelines.preparation.plan import load_plan
from pipelines.preparation.row_images import SourceFiles
from pipelines.preparation.settings import SourceSettings
from pipelines.preparation.sources import PlanError, source_terms
from pipelines.prepare import prepare
from pipelines.storage import states
from pipelines.storage.states import ObjectFolder, State
from tests.corpus import Row, encoded, row, write_corpus, write_processor
from tests.preparation import begin, do_chunk, prepare_here, prepare_settings

PLACES = ["local", pytest.param("s3", marks=pytest.mark.s3)]


@pytest.fixture(params=PLACES)
def images(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where the images of twelve good rows lie, of which three have none; the corpus and the processor are local."""
    write_corpus(tmp_path, 12)
    write_processor(tmp_path)
    if request.param == "local":
        return str(tmp_path)
    uri = request.getfixturevalue("s3_uri")
    for file in (tmp_path / "images").iterdir():
        storage.write_bytes(storage.join(uri, "images", file.name), file.read_bytes())
    return uri


def remove(uri: str) -> None:
    file_system, path = storage.filesystem(uri)
    file_system.rm_file(path)


def pins_of(folder: Path, images: str, **source: Any) -> ImagePins | None:
    terms = source_terms([SourceSettings(path=str(folder / "corpus.jsonl"), image_root=images, **source)])
    chunks = index_files(range(1), terms, [terms[0].path], 4)
    return find_pins(terms, [SourceFiles(terms[0].path, images)], chunks)


def test_an_image_that_changes_after_the_plan_is_named_with_both_states(images: str, tmp_path: Path) -> None:
    image = storage.join(images, "images/5.jpg")
    late = storage.join(images, "images/8.jpg")
    kept = storage.read_bytes(late)
    remove(late)  # so that it appears after the plan
    settings = prepare_settings(
        tmp_path, sources=[{"path": str(tmp_path / "corpus.jsonl"), "image_root": images}], max_quarantined_share=0.5
    )
    ledger, maker = begin(settings)
    assert ledger.plan.pins and (ledger.plan.pins.images, ledger.plan.pins.absent) == (9, 1)
    assert "images that rows name: 8 pinned as they are, 1 not there" in ledger.plan.describe("")
    ledger.commit(do_chunk(ledger, maker, 0))
    before = storage.read_bytes(image)
    same_size = before[:-4] + bytes(2) + before[-2:]
    state = r"\d+-[0-9a-f]{16}"
    for change, now in ((same_size, state), (encoded(99), state), (None, "not there")):
        remove(image) if change is None else storage.write_bytes(image, change)
        _, resumed = begin(settings)  # with the pins of the plan that is there
        for each in (maker, resumed):
            with pytest.raises(PlanError) as raised:
                do_chunk(ledger, each, 1)
            expected = rf"{image} has changed since .*then {state}, now {now}\)"
            assert re.match(expected, str(raised.value)), raised.value
    storage.write_bytes(late, kept)
    with pytest.raises(PlanError, match=rf"{late} has changed since .*then not there, now {state}\)"):
        do_chunk(ledger, maker, 2)
    assert len(storage.list_names(storage.join(settings.output, "receipts"))) == 1


def test_an_image_that_is_not_pinned_may_change(images: str, tmp_path: Path) -> None:
    source = {"path": str(tmp_path / "corpus.jsonl"), "image_root": images}
    settings = prepare_settings(tmp_path, sources=[source], pin_images=False)
    ledger, maker = begin(settings)
    assert ledger.plan.pins is None
    storage.write_bytes(storage.join(images, "images/5.jpg"), encoded(99))
    assert do_chunk(ledger, maker, 1).written == 4
    with pytest.raises(PlanError, match="pin_images: was False, now True"):
        prepare(prepare_settings(tmp_path, sources=[source]))


def test_an_image_is_found_and_pinned_however_its_path_is_spelled(images: str, tmp_path: Path) -> None:
    paths = ("./images/0.jpg", "images//1.jpg", "images/./2.jpg", "images/4.jpg")
    write_corpus(tmp_path, [row(0, image=path) for path in paths])
    source = {"path": str(tmp_path / "corpus.jsonl"), "image_root": images}
    ledger, maker = begin(prepare_settings(tmp_path, sources=[source], chunk_rows=1))
    assert ledger.plan.pins and (ledger.plan.pins.images, ledger.plan.pins.absent) == (4, 0)
    for chunk, number in enumerate((0, 1, 2, 4)):
        assert do_chunk(ledger, maker, chunk).written == 1
        image = storage.join(images, f"images/{number}.jpg")
        storage.write_bytes(image, encoded(99))
        with pytest.raises(PlanError, match=f"{image} has changed since the plan was made"):
            do_chunk(ledger, maker, chunk)


def test_an_image_of_too_many_bytes_is_quarantined_and_pinned(
    images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = storage.join(images, "images/0.jpg")
    storage.write_bytes(large, bytes(5000))
    monkeypatch.setattr("pipelines.preparation.row_images._MOST_BYTES", 4999)
    write = {"sources": [{"path": str(tmp_path / "corpus.jsonl"), "image_root": images}], "max_quarantined_share": 0.5}
    ledger, maker = begin(prepare_settings(tmp_path, **write))
    receipt = do_chunk(ledger, maker, 0)
    [bad] = receipt.quarantined
    assert (receipt.written, bad.reason) == (3, "image_too_many_bytes")
    assert bad.detail == f"{large}: 5,000 bytes; at most 4,999 may be read"
    storage.write_bytes(large, bytes(6000))
    with pytest.raises(PlanError, match=f"{large} has changed since the plan was made"):
        do_chunk(ledger, maker, 0)


def test_a_listing_of_many_pages_finds_what_single_reads_find(
    images: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(states, "_PAGE", 5)
    folder = ObjectFolder(images)
    listed = dict(folder.states("images"))
    assert sorted(listed) == sorted(f"{number}.jpg" for number in range(12))
    for name, state in listed.items():
        data, now = folder.read(f"images/{name}")
        assert now == state and state.size == len(data)
    assert list(folder.states("nowhere")) == []
    assert dict(folder.states("")).keys() <= {"corpus.jsonl"}  # what lies deeper is not listed


def test_only_named_images_are_pinned_and_each_once(tmp_path: Path) -> None:
    rows: list[Row | str] = [
        row(0),
        row(1, image="images/0.jpg"),
        row(2, image="./images/2.jpg"),
        row(3),
        row(4, image="../4.jpg"),
    ]
    write_corpus(tmp_path, rows)
    pins = pins_of(tmp_path, str(tmp_path))
    named = sorted(image_hash(str(tmp_path), f"images/{number}.jpg") for number in (0, 2))
    assert pins and pins.table["name"].tolist() == named
    assert (pins.facts().absent, pins.facts().unpinned) == (0, 0)
    again = pins_of(tmp_path, str(tmp_path), weight=2.0)
    assert again and again.facts() == pins.facts()
    pins.check(str(tmp_path), "images/0.jpg", State((tmp_path / "images/0.jpg").stat().st_size, stamp(tmp_path, 0)))
    with pytest.raises(PlanError, match=r"images/2\.jpg has changed since the plan was made"):
        pins.check(str(tmp_path), "images/2.jpg", State(1, 1))


def stamp(folder: Path, number: int) -> int:
    return (folder / "images" / f"{number}.jpg").stat().st_mtime_ns


def test_rows_are_read_in_runs_larger_than_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.preparation.pinning._ROWS_AT_ONCE", 10)
    for name in ("a.json", "b.jsonl"):
        write_corpus(tmp_path, 20, name)
    sources = [SourceSettings(path=str(tmp_path / name), image_root=str(tmp_path)) for name in ("a.json", "b.jsonl")]
    terms = source_terms([*sources, SourceSettings(path=str(tmp_path / "b.jsonl"), name="text")][:2])
    chunks = [chunk for n in range(2) for chunk in index_files(range(n, n + 1), terms, [t.path for t in terms], 4)]
    runs = stretches(terms, chunks)
    assert [(run.source, run.first_row, run.rows) for run in runs] == [
        *((0, 0, 8), (0, 8, 8), (0, 16, 4)),
        *((1, 0, 8), (1, 8, 8), (1, 16, 4)),
    ]
    for run in runs:
        expected = {
            image_hash(str(tmp_path), f"images/{n}.jpg")
            for n in range(run.first_row, run.first_row + run.rows)
            if n % 4 != 3
        }
        assert set(named_images(terms[run.source], terms[run.source].path, run).names.tolist()) == expected


@pytest.mark.parametrize(
    ("row_bytes", "weight", "gap", "rows"),
    [
        (200, 1.0, 0, [2000]),  # of text
        (300_000, 1.0, 0, [600, 600, 600, 200]),  # with their images: 180 MB
        (300_000, 0.5, 200, [400, 400, 400, 400, 400]),  # as many again lie between them
        (90_000_000, 1.0, 0, [200] * 10),  # no two fit
        (200, 0.01, 15_000, [400] * 5),
    ],
)
def test_runs_are_no_larger_than_a_task_can_hold(
    tmp_path: Path, row_bytes: int, weight: float, gap: int, rows: list[int]
) -> None:
    path = write_corpus(tmp_path, 1)
    source = SourceSettings(path=str(path), format="messages", image_root=str(tmp_path), weight=weight)
    chunks = [
        Chunk(source=0, start=n, stop=n + 200, first_row=n, rows=200, first_line=1, size=200 * row_bytes)
        for n in range(0, 10 * (200 + gap), 200 + gap)
    ]
    runs = stretches(source_terms([source]), chunks)
    assert [run.rows for run in runs] == rows
    assert sum(run.size for run in runs) == 2000 * row_bytes


def test_a_folder_costs_the_same_however_many_images_are_named(tmp_path: Path) -> None:
    folders = [f"{number}" for number in range(20)]
    for folder in folders:
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "0.jpg").write_bytes(b"x")
    mine = [image_hash(str(tmp_path), f"{folder}/0.jpg") for folder in folders]
    seconds = []
    for count in (1_000, 300_000):
        others = np.random.default_rng(0).integers(0, 2**63, count, np.uint64)
        names = np.unique(np.concatenate([others, np.array(mine, np.uint64)]))
        start = time.process_time()
        listed = list_images(str(tmp_path), str(tmp_path), names, folders)
        seconds.append(time.process_time() - start)
        assert sorted(listed.states[:, 0].tolist()) == sorted(mine)
    assert seconds[1] < 10 * seconds[0]


def test_two_images_with_one_hash_are_not_pinned() -> None:
    found = np.array([[7, 1, 1], [5, 2, 2], [7, 3, 3]], np.uint64)
    pins = ImagePins.of(found, np.array([2], np.uint64), unpinned=1)
    assert pins.table["name"].tolist() == [2, 5]
    facts = pins.facts()
    assert (facts.images, facts.absent, facts.unpinned) == (2, 1, 3)


def test_pins_are_verified_and_collected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path, 8)
    write_processor(tmp_path)
    settings = prepare_settings(tmp_path)
    prepare_here(settings)
    plan = load_plan(settings.output)
    assert plan and plan.pins
    table, other = Path(settings.output) / plan.pins.name, Path(settings.output) / "pins" / f"{'0' * 64}.arrow"
    other.write_bytes(b"of a run that was killed before its plan")
    assert main(["gc", settings.output]) == 0
    assert table.exists() and not other.exists()
    assert main(["verify", settings.output]) == 0
    table.write_bytes(table.read_bytes()[:-1] + b"x")
    assert main(["verify", settings.output]) == 1
    assert f"{table}: expected sha256 {plan.pins.sha256}, found " in capsys.readouterr().err
    table.unlink()
    assert main(["verify", settings.output]) == 1
    assert f"{table}: no such file, which the plan names" in capsys.readouterr().err


def test_what_cannot_be_read_harms_no_other_image_whether_a_row_names_it_or_not(tmp_path: Path) -> None:
    unreadable = ("images/loop", f"{'x' * 300}/0.jpg", "a/" * 3000 + "0.jpg")
    write_corpus(tmp_path, [row(0), *(row(0, image=image) for image in unreadable), row(4)])
    write_processor(tmp_path)
    for name in ("loop", "no-row-names-this-loop"):
        (tmp_path / "images" / name).symlink_to(name)
    (tmp_path / "images" / "through-a-file").symlink_to("0.jpg/0.jpg")
    Path(os.fsdecode(os.fsencode(tmp_path / "images") + b"/caf\xe9.jpg")).write_bytes(encoded(1))
    for pin in (True, False):
        settings = prepare_settings(tmp_path, output=f"{tmp_path}/{pin}", pin_images=pin, max_quarantined_share=0.6)
        manifest = prepare_here(settings)
        assert (manifest.written, manifest.quarantine_reasons) == (2, {"image_missing": 3})
    plan = load_plan(f"{tmp_path}/True")
    assert plan and plan.pins and (plan.pins.images, plan.pins.absent, plan.pins.unpinned) == (5, 3, 0)
