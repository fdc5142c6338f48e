"""Shards and their manifest: what is written is read, and what was changed afterwards is named."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from pipelines import storage
from pipelines.shards import Manifest, ManifestError, ShardedDataset, ShardError
from pipelines.shards.manifest import MANIFEST_NAME
from pipelines.shards.receipts import AccountingError, account
from pipelines.shards.schema import SAMPLE_SCHEMA
from tests.shards import DTYPES, FIELDS, SHAPES, flip_a_bit, truncate, write_dataset


@pytest.mark.parametrize("payload", ["original", "pixels", "features"])
def test_every_row_reads_as_it_was_written(tmp_path: Path, payload: str) -> None:
    samples = write_dataset(str(tmp_path), payload)
    dataset = ShardedDataset(str(tmp_path))
    assert len(dataset) == len(samples)
    for index in np.random.default_rng(0).permutation(len(samples)):
        written, read = samples[index], dataset.read(int(index))
        for name in ("key", "id", "source", "messages", "question_types"):
            assert read[name] == written[name]
        for name in ("input_ids", "labels", "question_ids"):
            assert read[name].dtype == np.int32
            assert read[name].tolist() == written[name]
        assert (FIELDS[payload] in read) == ("image" in written)
        if payload == "original" and "image" in written:
            assert read["image_bytes"] == written["image"]
        elif "image" in written:
            image = read[FIELDS[payload]]
            assert (list(image.shape), str(image.dtype)) == (SHAPES[payload], DTYPES[payload])
            assert image.tobytes() == written["image"]
            assert image.flags.writeable


def test_numbers_of_rows_come_from_the_manifest_alone(tmp_path: Path) -> None:
    samples = write_dataset(str(tmp_path))
    for shard in (tmp_path / "shards").iterdir():
        shard.unlink()
    dataset = ShardedDataset(str(tmp_path))
    assert dataset.num_tokens.tolist() == [len(row["input_ids"]) for row in samples]
    assert dataset.num_loss_tokens.tolist() == [sum(x != -100 for x in row["labels"]) for row in samples]
    assert dataset.has_image.tolist() == ["image" in row for row in samples]
    assert dataset.manifest.shards[0].num_turns == [2] * 4


def test_equal_rows_give_an_equal_dataset(tmp_path: Path) -> None:
    identities = []
    for name in ("a", "b"):
        write_dataset(str(tmp_path / name))
        identities.append(Manifest.load(str(tmp_path / name)).identity())
    assert identities[0] == identities[1]


def test_a_row_is_one_record_batch(tmp_path: Path) -> None:
    write_dataset(str(tmp_path), rows=4)
    [shard] = (tmp_path / "shards").iterdir()
    with pa.ipc.open_file(shard) as file:
        assert [file.get_batch(number).num_rows for number in range(file.num_record_batches)] == [1] * 4


def test_pickled_copy_and_threads_read_the_same(tmp_path: Path) -> None:
    samples = write_dataset(str(tmp_path))
    dataset = ShardedDataset(str(tmp_path))
    dataset.read(0)
    copy = pickle.loads(pickle.dumps(dataset))
    with ThreadPoolExecutor(8) as threads:
        keys = list(threads.map(lambda index: copy.read(index)["key"], list(range(10)) * 20))
    assert keys == [row["key"] for row in samples] * 20


@pytest.mark.parametrize("index", [-1, 10])
def test_no_such_row(tmp_path: Path, index: int) -> None:
    write_dataset(str(tmp_path))
    with pytest.raises(IndexError, match="10 rows"):
        ShardedDataset(str(tmp_path)).read(index)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, r"expected \d+ bytes with sha256 [0-9a-f]{64}, found \d+ with [0-9a-f]{64}"),
        (flip_a_bit, r"expected \d+ bytes with sha256 [0-9a-f]{64}, found \d+ with [0-9a-f]{64}"),
        (Path.unlink, "expected .* sha256 [0-9a-f]{64}, found no such file"),
    ],
)
def test_damaged_shard_is_named(tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    write_dataset(str(tmp_path))
    dataset = ShardedDataset(str(tmp_path))
    name = dataset.manifest.shards[1].name
    damage(tmp_path / name)
    assert dataset.read(0)["key"] == "corpus:0"
    with pytest.raises(ShardError, match=message) as raised:
        dataset.read(5)
    assert name in str(raised.value)
    with pytest.raises(ShardError, match=message):  # still, and not only the first time
        dataset.read(5)


def test_damage_after_a_row_was_read_is_noticed(tmp_path: Path) -> None:
    write_dataset(str(tmp_path))
    dataset = ShardedDataset(str(tmp_path))
    for index in (4, 5, 6, 7):
        dataset.read(index)
    flip_a_bit(tmp_path / dataset.manifest.shards[1].name)  # in the file that is open
    with pytest.raises(ShardError, match=r"expected .* sha256 [0-9a-f]{64}, found .* with [0-9a-f]{64}"):
        for index in (4, 5, 6, 7):
            dataset.read(index)


def test_every_flipped_bit_is_noticed_by_who_reads_the_shard(tmp_path: Path) -> None:
    """Also one before the first row or behind the last, which spoils the file for other readers of Arrow alone."""
    write_dataset(str(tmp_path))
    entry = ShardedDataset(str(tmp_path)).manifest.shards[1]
    path = tmp_path / entry.name
    whole = path.read_bytes()
    head, foot = range(entry.row_offsets[0]), range(entry.row_offsets[-1], entry.bytes)
    assert len(head) > 500 and len(foot) > 500
    places = [*random.Random(0).sample(range(entry.bytes), 40), *head[::60], *foot[::60], foot[-1]]
    for place in places:
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(data)
        found = storage.sha256(bytes(data))
        dataset = ShardedDataset(str(tmp_path))
        message = f"{entry.name}: .*sha256 {entry.sha256}, found {entry.bytes} with {found}"
        with pytest.raises(ShardError, match=message):
            for index in (4, 5, 6, 7):
                dataset.read(index)


def test_manifest_from_before_frames_had_checksums_stays_equal(tmp_path: Path) -> None:
    write_dataset(str(tmp_path))
    path = tmp_path / MANIFEST_NAME
    older = json.loads(path.read_text())
    for shard in older["shards"]:
        assert len(shard.pop("frame_checksum")) == 16
    data = json.dumps(older, separators=(",", ":")).encode()
    path.write_bytes(data)
    dataset = ShardedDataset(str(tmp_path))
    assert dataset.manifest.identity() == storage.sha256(data)  # by which a training run knows its data again
    assert dataset.read(4)["key"] == "corpus:4"


def test_arrays_of_rows_share_no_memory(tmp_path: Path) -> None:
    write_dataset(str(tmp_path))
    dataset = ShardedDataset(str(tmp_path))
    first, again = dataset.read(1), dataset.read(1)
    first["pixel_values"][:] = 255
    assert not np.shares_memory(first["pixel_values"], again["pixel_values"])
    assert np.array_equal(dataset.read(1)["pixel_values"], again["pixel_values"])


def test_folder_without_manifest_is_no_dataset(tmp_path: Path) -> None:
    write_dataset(str(tmp_path))
    (tmp_path / MANIFEST_NAME).unlink()
    with pytest.raises(ManifestError, match=r"no manifest\.json.*jobs/prepare\.py"):
        ShardedDataset(str(tmp_path))


def test_broken_manifest_names_the_field(tmp_path: Path) -> None:
    write_dataset(str(tmp_path))
    path = tmp_path / MANIFEST_NAME
    path.write_text(path.read_text().replace('"payload":"pixels"', '"payload":"pictures"'))
    with pytest.raises(ManifestError, match=r"manifest\.json.*payload"):
        ShardedDataset(str(tmp_path))


@pytest.mark.parametrize(
    ("written", "quarantined", "message"),
    [
        (["a", "b"], [], "3 rows planned, 2 written, 0 quarantined; lost: c"),
        (["a", "b", "c"], ["c"], "doubled: c"),
        (["a", "b", "c", "d"], [], "not planned: d"),
    ],
)
def test_every_key_is_accounted_for_once(written: list[str], quarantined: list[str], message: str) -> None:
    account(["a", "b", "c"], ["a", "c"], ["b"])
    with pytest.raises(AccountingError, match=message):
        account(["a", "b", "c"], written, quarantined)


def test_dataset_from_before_images_could_be_shared_is_read(tmp_path: Path) -> None:
    samples = write_dataset(str(tmp_path))
    older = [name for name in SAMPLE_SCHEMA.names if name not in ("image_key", "image_scales")]
    manifest = Manifest.load(str(tmp_path))
    shards = []
    for shard in manifest.shards:
        rows = pa.ipc.open_file(tmp_path / shard.name).read_all().select(older)
        with pa.ipc.new_file(tmp_path / shard.name, rows.schema) as writer:
            for row in range(rows.num_rows):
                writer.write_table(rows.slice(row, 1))
        data = (tmp_path / shard.name).read_bytes()
        facts = {"bytes": len(data), "sha256": storage.sha256(data), "row_offsets": None, "row_checksums": None}
        shards.append(shard.model_copy(update=facts))
    columns = {name: kind for name, kind in manifest.arrow_schema.items() if name in older}
    changed = manifest.model_copy(update={"shards": shards, "arrow_schema": columns})
    (tmp_path / MANIFEST_NAME).write_bytes(changed.to_json())
    dataset = ShardedDataset(str(tmp_path))
    for number, expected in enumerate(samples):
        read = dataset.read(number)
        assert read["key"] == expected["key"]
        assert ("pixel_values" in read) == ("image" in expected)
