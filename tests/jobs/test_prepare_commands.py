"""jobs/prepare.py verify, inspect and gc: what a person reads, what is found, and what is removed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jobs.prepare import main
from pipelines import storage
from pipelines.preparation.settings import SourceSettings
from pipelines.shards import Manifest, ShardedDataset
from tests.corpus import bad_rows, row, write_corpus, write_processor
from tests.preparation import begin, do_chunk, prepare_here, prepare_settings


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven good rows and, after the fifth, a bad one. Read only: copy it before changing it."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "images").mkdir()
    rows = [row(number) for number in range(11)]
    write_corpus(folder, [*rows[:5], bad_rows(folder)["image_missing"], *rows[5:]])
    write_processor(folder)
    prepare_here(prepare_settings(folder))
    return folder / "out"


@pytest.fixture
def changeable(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize("command", ["verify", "inspect", "gc"])
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"usage: prepare.py {command}" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["verify", "inspect", "gc"])
def test_a_folder_that_is_no_dataset_is_named(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no ")


def test_help_tells_what_a_source_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    told = " ".join(capsys.readouterr().out.split())
    for name, field in SourceSettings.model_fields.items():
        assert f"{name} ({'required' if field.is_required() else f'default: {field.default!r}'}): " in told
    assert "How its rows are written: llava, sharegpt, messages," in told


def test_verify_passes_what_was_written(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", str(finished)]) == 0
    assert "every shard is as it was written" in capsys.readouterr().out


def test_verify_names_everything_that_changed(changeable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Manifest.load(str(changeable)).quarantine.sha256
    with (changeable / "quarantine.parquet").open("r+b") as file:
        file.write(b"X")
    receipts = sorted((changeable / "receipts").glob("*.json"))
    receipts[0].unlink()
    receipts[1].write_text("{}")
    assert main(["verify", str(changeable)]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 3
    assert "quarantine.parquet: expected " in errors[0] and f" sha256 {before}, found " in errors[0]
    assert f"{receipts[0]}: expected the receipt of a chunk, found no such file; restore it, or remove m" in errors[1]
    assert f"{receipts[1]}: not a receipt" in errors[2]


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_damaged_table_of_quarantined_rows_is_written_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    write_processor(tmp_path)
    (tmp_path / "images").mkdir()
    write_corpus(tmp_path, [*(row(number) for number in range(11)), bad_rows(tmp_path)["image_missing"]])
    expected = prepare_here(prepare_settings(tmp_path))
    out, table = tmp_path / "out", tmp_path / "out" / "quarantine.parquet"
    table.unlink() if damage == "gone" else table.write_bytes(b"X" + table.read_bytes()[1:])
    capsys.readouterr()
    for arguments in (["verify", str(out)], ["inspect", str(out), "--quarantined"]):
        assert main(arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: {table}: expected ") and "shard" not in error and error.count("\n") == 1
        assert "restore it, or remove manifest.json and prepare again: it is then written anew" in error
    (out / "manifest.json").unlink()
    assert begin(prepare_settings(tmp_path))[0].pending == []
    assert prepare_here(prepare_settings(tmp_path)) == expected
    assert main(["verify", str(out)]) == 0


def test_verify_compares_plan_and_receipts_with_the_manifest(
    changeable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, _ = sorted((changeable / "receipts").glob("*.json"))
    text = first.read_text()
    first.write_text(text.replace('"num_tokens":[', '"num_tokens":[1'))
    assert main(["verify", str(changeable)]) == 1
    assert "the receipts name other shards than the manifest" in capsys.readouterr().err
    first.write_text(text)
    plan = changeable / "plan.json"
    plan.write_text(plan.read_text().replace('"layout":"chat"', '"layout":"caption"'))
    assert main(["verify", str(changeable)]) == 1
    assert f"plan.json: expected the plan with sha256 {Manifest.load(str(changeable)).plan}" in capsys.readouterr().err
    assert second.exists()


def test_verify_finds_what_was_changed_in_manifest_and_data_receipt(
    changeable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, receipt = changeable / "manifest.json", changeable / "receipt.json"
    manifest = Manifest.load(str(changeable))
    changed = {"layout": "caption", "max_length": manifest.max_length + 1, "written": 12, "quarantine_reasons": {}}
    path.write_bytes(manifest.model_copy(update=changed).to_json())
    assert main(["verify", str(changeable)]) == 1
    errors = capsys.readouterr().err
    for field, value in changed.items():
        planned = getattr(manifest, field)
        assert f"{path}: {field} is {value!r}, by the plan and its receipts {planned!r}" in errors
    assert f"{receipt}: tells of the manifest {manifest.identity()}; the one here is " in errors
    path.write_bytes(manifest.to_json())
    receipt.write_text("rubbish")
    assert main(["verify", str(changeable)]) == 1
    assert f"{receipt}: not a data receipt" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["receipt.json", "receipt.html", "plan.json", "receipts/00000000.json"])
def test_what_verify_advises_for_a_file_that_got_lost_brings_it_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    write_corpus(tmp_path, 5)
    write_processor(tmp_path)
    expected = prepare_here(prepare_settings(tmp_path))
    lost = tmp_path / "out" / name
    lost.unlink()
    assert main(["verify", str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {lost}: expected ") and "found no such file; restore it, or " in error
    if "remove manifest.json" in error:
        (tmp_path / "out" / "manifest.json").unlink()
    assert prepare_here(prepare_settings(tmp_path)) == expected
    assert lost.exists()
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_commands_that_need_a_file_that_got_lost_say_so(changeable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (changeable / "receipts" / "00000000.json").unlink()
    assert main(["inspect", str(changeable), "--key", "corpus:1"]) == 1
    assert "00000000.json: expected the receipt of a chunk, found no such file; " in capsys.readouterr().err
    (changeable / "plan.json").unlink()
    for command in (["inspect", str(changeable), "--key", "corpus:1"], ["gc", str(changeable)]):
        assert main(command) == 1
        error = capsys.readouterr().err
        assert f"error: {changeable}: no plan.json here, " in error
        assert "run the job again as before: it makes the same plan" in error


@pytest.mark.parametrize("command", ["verify", "inspect", "gc"])
def test_a_file_is_no_dataset(finished: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert main([command, str(finished / "manifest.json")]) == 1
    assert capsys.readouterr().err.startswith(f"error: {finished}/manifest.json: no ")


def test_inspect_says_where_nothing_is_quarantined(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path, 1)
    write_processor(tmp_path)
    prepare_here(prepare_settings(tmp_path))
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out"), "--quarantined"]) == 0
    assert capsys.readouterr().out == "no row is quarantined\n"


def test_inspect_shows_a_row_as_a_person_reads_it(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(finished), "--key", "corpus:2"]) == 0
    tokens = len(ShardedDataset(str(finished)).read(2)["input_ids"])
    out = capsys.readouterr().out
    assert "corpus:2  (id own-2, source corpus)" in out
    assert "image   pixels uint8[1, 3, 126, 126], 47,628 bytes" in out
    assert f"tokens  {tokens}, of which " in out
    assert "user      What color is the square?\n  assistant The square is red." in out
    assert "USER: <image>x9\\nWhat color is the square? <learnable>x9 ASSISTANT: The square is red.</s>USER: " in out
    assert "learned  The square is red.</s> …  2 circles.</s>" in out


def test_inspect_finds_rows_behind_a_quarantined_one(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The sixth row of the corpus is bad: the dataset's numbers and the keys differ from there on."""
    for position in range(12):
        assert main(["inspect", str(finished), "--key", f"corpus:{position}"]) == 0
        shown = capsys.readouterr().out
        assert shown.startswith(f"corpus:{position}  ")
        assert ("image_missing: " in shown) == (position == 5)


def test_inspect_shows_the_first_rows_and_the_quarantine(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(finished), "--rows", "2"]) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("corpus:")] == [
        "corpus:0  (id own-0, source corpus)",
        "corpus:1  (id own-1, source corpus)",
    ]
    assert main(["inspect", str(finished), "--quarantined"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("corpus:5  (id own-0, source corpus)\n  at ")
    assert "corpus.jsonl:6\n  image_missing: 'images/nowhere.jpg': no such file below" in out


@pytest.mark.parametrize("key", ["corpus:12", "other:1", "corpus:x", "corpus", ""])
def test_inspect_of_an_unknown_key(finished: Path, capsys: pytest.CaptureFixture[str], key: str) -> None:
    assert main(["inspect", str(finished), f"--key={key}"]) == (1 if key else 0)
    assert not key or f"no row has the key '{key}'" in capsys.readouterr().err


def test_inspect_hands_no_command_of_a_corpus_to_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "\x1b[2J\x9b31m\rred\tand\ngreen"}]
    write_corpus(tmp_path, [row(3, id="\x1b]0;title\x07", conversations=turns)])
    write_processor(tmp_path)
    prepare_here(prepare_settings(tmp_path))
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert r"(id \x1b]0;title\x07, source corpus)" in out
    assert "  assistant \\x1b[2J\\x9b31m\\rred\tand\n            green" in out
    assert not set(out) & {"\x1b", "\x9b", "\r", "\x07"}


def test_inspect_ends_quietly_where_nobody_reads_on(finished: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "jobs/prepare.py", "inspect", str(finished)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("rows", ["0", "-3", "x", "²"])
def test_inspect_shows_at_least_a_row(finished: Path, capsys: pytest.CaptureFixture[str], rows: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["inspect", str(finished), f"--rows={rows}"])
    assert stopped.value.code == 2
    assert f"{rows} is no number of rows: give 1 or more" in capsys.readouterr().err


@pytest.mark.parametrize("hours", ["-1", "nan", "x"])
def test_gc_takes_no_age_below_zero(finished: Path, capsys: pytest.CaptureFixture[str], hours: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["gc", str(finished), f"--older-than={hours}"])
    assert stopped.value.code == 2
    assert f"{hours} hours is no age: give 0 or more" in capsys.readouterr().err


def test_inspect_without_the_processor_says_so(changeable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (changeable / "config.yaml").unlink()
    assert main(["inspect", str(changeable)]) == 0
    out, err = capsys.readouterr()
    assert "no config.yaml here, so token ids are not shown as text" in err
    assert "corpus:0  (id own-0" in out and "given" not in out


@pytest.mark.parametrize("text", ["{", "foo: [", "foo", "", "1: 2", "foo: 2024-13-45", "foo: 1"])
def test_inspect_with_damaged_settings_says_so(changeable: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    path = changeable / "config.yaml"
    path.write_text(text)
    assert main(["inspect", str(changeable)]) == 0
    out, err = capsys.readouterr()
    assert err == f"token ids are not shown as text: {path} is damaged, or of another version; restore it\n"
    assert "corpus:0  (id own-0" in out and "given" not in out


def test_gc_removes_only_what_no_receipt_names(changeable: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = {path for path in changeable.rglob("*") if path.is_file()}
    orphan, part = (
        changeable / "shards" / f"{'0' * 64}.arrow",
        changeable / "receipts" / f".00000001.json.{'1' * 32}.part",
    )
    orphan.write_bytes(b"x" * 1_000_000)
    part.write_bytes(b"x" * 500_000)
    assert main(["gc", str(changeable), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert f"{orphan}  1,000,000 bytes, 0.0 h old" in out
    assert "2 objects would be removed, 1.5 MB" in out
    assert orphan.exists() and part.exists()
    assert main(["gc", str(changeable)]) == 0
    assert "2 objects removed, 1.5 MB" in capsys.readouterr().out
    assert {path for path in changeable.rglob("*") if path.is_file()} == kept
    assert main(["verify", str(changeable)]) == 0


def test_gc_leaves_the_published_shards_where_a_receipt_got_lost(
    changeable: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    receipts = sorted((changeable / "receipts").iterdir())
    receipts[0].unlink()
    kept = {path for path in changeable.rglob("*") if path.is_file()}
    assert main(["gc", str(changeable)]) == 0
    assert "0 objects removed" in capsys.readouterr().out
    assert {path for path in changeable.rglob("*") if path.is_file()} == kept
    manifest = changeable / "manifest.json"
    manifest.write_text(manifest.read_text()[:-10])
    assert main(["gc", str(changeable)]) == 1
    assert f"error: {manifest}: not a manifest" in capsys.readouterr().err


def test_gc_leaves_what_is_not_of_our_making_in_a_folder_that_is_also_the_corpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_corpus(tmp_path, 3)
    write_processor(tmp_path)
    mine = [tmp_path / "shards" / "mine.arrow", tmp_path / "pins" / "a.arrow", tmp_path / "images" / ".film.part"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"mine")
    prepare_here(prepare_settings(tmp_path, output=str(tmp_path)))
    kept = {path for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["gc", str(tmp_path)]) == 0
    assert "0 objects removed" in capsys.readouterr().out
    assert {path for path in tmp_path.rglob("*") if path.is_file()} == kept


def test_gc_leaves_the_work_of_a_running_driver_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_corpus(tmp_path, 12)
    write_processor(tmp_path)
    settings = prepare_settings(tmp_path)
    ledger, maker = begin(settings)
    done, under_way, left = (do_chunk(ledger, maker, number) for number in range(3))
    ledger.commit(done)
    assert under_way.shard and left.shard
    old = tmp_path / "out" / left.shard.name
    two_days_ago = time.time() - 48 * 3600
    os.utime(old, (two_days_ago, two_days_ago))
    assert main(["gc", settings.output]) == 1
    assert "the preparation has not finished" in capsys.readouterr().err
    assert main(["gc", settings.output, "--older-than", "24"]) == 0
    assert not old.exists()
    ledger.commit(under_way)
    ledger.commit(do_chunk(ledger, maker, 2))
    ledger.publish()
    assert main(["verify", settings.output]) == 0


@pytest.mark.s3
def test_gc_on_an_object_store(changeable: Path, s3_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    folder = storage.join(s3_uri, "out")
    for file in changeable.rglob("*"):
        if file.is_file():
            storage.write_bytes(storage.join(folder, str(file.relative_to(changeable))), file.read_bytes())
    left = f"{'0' * 64}.arrow"
    storage.write_bytes(storage.join(folder, "shards", left), b"x" * 1000)
    storage.write_bytes(storage.join(folder, "images", "mine.jpg"), b"x" * 1000)
    assert main(["gc", folder]) == 0
    assert "1 object removed, 0.0 MB" in capsys.readouterr().out
    assert left not in storage.list_names(storage.join(folder, "shards"))
    assert storage.list_names(storage.join(folder, "images")) == ["mine.jpg"]
    assert main(["verify", folder]) == 0
