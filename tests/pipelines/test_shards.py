"""Shards and their manifest: what is written is read, and what was changed afterwards is named."""

from __future__ import annotations

import json
import pickle
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from torch.utils.data import DataLoader, Dataset

from pipelines import storage
from pipelines.shards import Manifest, ManifestError, ShardedDataset, ShardError
from pipelines.shards.cache import ShardCache
from pipelines.shards.manifest import MANIFEST_NAME, QuarantineEntry, ShardEntry
from pipelines.shards.receipts import AccountingError, account
from pipelines.shards.schema import SAMPLE_SCHEMA, describe
from pipelines.shards.writer import write_shard

SHAPES = {"pixels": [1, 3, 4, 4], "features": [1, 9, 8], "original": []}
DTYPES = {"pixels": "uint8", "features": "float16", "original": ""}
FIELDS = {"pixels": "pixel_values", "features": "patch_features", "original": "image_bytes"}


def sample(number: int, payload: str) -> dict[str, Any]:
    """Every third row is text only."""
    rng = np.random.default_rng(number)
    ids = rng.integers(0, 100, 5 + number).tolist()
    image = rng.integers(0, 50, SHAPES[payload] or [7]).astype(DTYPES[payload] or "uint8")
    picture = {"image": image.tobytes(), "image_shape": SHAPES[payload], "image_dtype": DTYPES[payload]}
    return {
        "key": f"corpus:{number}",
        "id": "repeated",
        "source": "corpus",
        "messages": [{"role": "user", "content": f"question {number} é"}, {"role": "assistant", "content": "answer"}],
        "question_types": ["colour"],
        "input_ids": ids,
        "labels": [-100] * 3 + ids[3:],
        "question_ids": [0, 1, 2, *[0] * (len(ids) - 3)],
    } | (picture if number % 3 else {})


def write_dataset(folder: str, payload: str = "pixels", rows: int = 10, per_shard: int = 4) -> list[dict[str, Any]]:
    samples = [sample(number, payload) for number in range(rows)]
    parts = [samples[start : start + per_shard] for start in range(0, rows, per_shard)]
    shards = [write_shard(folder, pa.Table.from_pylist(part, schema=SAMPLE_SCHEMA)) for part in parts]
    write_manifest(folder, payload, shards)
    return samples


def write_manifest(folder: str, payload: str, shards: list[ShardEntry]) -> None:
    rows = sum(shard.rows for shard in shards)
    manifest = Manifest(
        plan="0" * 64,
        payload=payload,
        layout="chat",
        max_length=3072,
        tiling="base",
        num_image_tokens=9,
        image_shape=SHAPES[payload] or None,
        processor_identity="1" * 64,
        encoder_identity=None,
        schema=describe(SAMPLE_SCHEMA),
        planned=rows,
        written=rows,
        quarantined=0,
        quarantine_reasons={},
        quarantine=QuarantineEntry(name="quarantine.parquet", rows=0, bytes=0, sha256=""),
        shards=shards,
    )
    storage.write_bytes(storage.join(folder, MANIFEST_NAME), manifest.to_json())


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


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


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


@pytest.mark.s3
def test_dataset_on_s3_is_fetched_once_and_checked(s3_uri: str, tmp_path: Path) -> None:
    samples = write_dataset(s3_uri)
    dataset = ShardedDataset(s3_uri, cache_dir=str(tmp_path))
    assert [dataset.read(index)["key"] for index in range(10)] == [row["key"] for row in samples]
    cached = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert len(cached) == 3
    first = dataset.manifest.shards[0]
    storage.write_bytes(storage.join(s3_uri, first.name), b"x" * first.bytes)
    assert ShardedDataset(s3_uri, cache_dir=str(tmp_path)).read(0)["key"] == "corpus:0"  # from the cache
    with pytest.raises(ShardError, match=f"{first.name}: expected {first.bytes} bytes with sha256 {first.sha256}"):
        ShardedDataset(s3_uri, cache_dir=str(tmp_path / "empty")).read(0)
    assert not any((tmp_path / "empty").rglob(f"*{first.sha256}*"))


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What is read of the store: (kind, bytes), while the real functions do the reading."""
    seen: list[tuple[str, int]] = []

    def watch(kind: str, read: Callable[..., bytes]) -> Callable[..., bytes]:
        def reading(*args: Any) -> bytes:
            data = read(*args)
            seen.append((kind, len(data)))
            return data

        return reading

    def downloading(uri: str, path: Path) -> None:
        download(uri, path)
        seen.append(("download", path.stat().st_size))

    download = storage.download
    monkeypatch.setattr(storage, "download", downloading)
    for kind in ("read_bytes", "read_range"):
        monkeypatch.setattr(storage, kind, watch(kind, getattr(storage, kind)))
    return seen


@pytest.mark.s3
@pytest.mark.parametrize("payload", ["original", "pixels", "features"])
def test_without_a_cache_a_row_is_one_ranged_get(
    s3_uri: str, tmp_path: Path, payload: str, fetched: list[tuple[str, int]]
) -> None:
    samples = write_dataset(s3_uri, payload)
    dataset = ShardedDataset(s3_uri, cache_dir=str(tmp_path), cache_bytes=0)
    cached = ShardedDataset(s3_uri, cache_dir=str(tmp_path / "cache"))
    fetched.clear()
    rows = [dataset.read(index) for index in range(len(samples))]
    assert [kind for kind, _ in fetched] == ["read_range"] * len(samples)
    assert not any(tmp_path.iterdir())
    for index, row in enumerate(rows):
        same = cached.read(index)
        assert row.keys() == same.keys()
        for name, value in row.items():
            assert np.array_equal(value, same[name]), name


@pytest.mark.s3
def test_a_cache_too_small_for_all_keeps_what_fits_and_reads_the_rest_by_ranges(
    s3_uri: str, tmp_path: Path, fetched: list[tuple[str, int]]
) -> None:
    samples = write_dataset(s3_uri)
    sizes = [shard.bytes for shard in Manifest.load(s3_uri).shards]
    dataset = ShardedDataset(s3_uri, cache_dir=str(tmp_path), cache_bytes=sizes[0] + sizes[1])
    fetched.clear()
    for _ in range(2):
        assert [dataset.read(index)["key"] for index in range(10)] == [row["key"] for row in samples]
    assert sorted(size for kind, size in fetched if kind == "download") == sorted(sizes[:2])
    assert sum(kind == "read_range" for kind, _ in fetched) == 2 * 2  # two rows of the third shard, each time
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= sizes[0] + sizes[1]


@pytest.mark.s3
def test_the_next_shards_come_while_one_is_read(s3_uri: str, tmp_path: Path) -> None:
    """And what is wrong with one of them is told to whoever reads it."""
    write_dataset(s3_uri)
    dataset = ShardedDataset(s3_uri, cache_dir=str(tmp_path))
    names = [f"{shard.sha256}.arrow" for shard in dataset.manifest.shards]
    storage.write_bytes(storage.join(s3_uri, dataset.manifest.shards[1].name), b"")
    assert dataset.read(0)["key"] == "corpus:0"
    deadline = time.monotonic() + 30
    while not (tmp_path / names[2]).exists():
        assert time.monotonic() < deadline, "the shard after the next one has not come"
        time.sleep(0.01)
    with pytest.raises(ShardError, match=rf"{names[1]}: expected \d+ bytes with sha256 \w+, found 0 with "):
        dataset.read(5)
    assert dataset.read(9)["key"] == "corpus:9"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([names[0], names[2]])


@pytest.mark.s3
def test_a_forked_process_fetches_ahead_too(s3_uri: str, tmp_path: Path) -> None:
    samples = write_dataset(s3_uri, rows=40)
    dataset = ShardedDataset(s3_uri, cache_dir=str(tmp_path))
    dataset.read(0)
    workers = DataLoader(Keys(dataset), batch_size=4, num_workers=2, multiprocessing_context="fork")
    assert [key for keys in workers for key in keys] == [row["key"] for row in samples]
    assert len(list(tmp_path.iterdir())) == 10


class Keys(Dataset[str]):
    """The keys of a dataset's rows, which are read for that."""

    def __init__(self, rows: ShardedDataset) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, row: int) -> str:
        return self._rows.read(row)["key"]


@pytest.mark.s3
def test_a_row_that_was_changed_is_named_and_its_neighbours_are_read(s3_uri: str) -> None:
    write_dataset(s3_uri)
    dataset = ShardedDataset(s3_uri, cache_bytes=0)
    entry = dataset.manifest.shards[1]
    data = bytearray(storage.read_bytes(storage.join(s3_uri, entry.name)))
    data[entry.row_offsets[2] - 20] ^= 1
    storage.write_bytes(storage.join(s3_uri, entry.name), bytes(data))
    with pytest.raises(ShardError, match=f"{entry.name}: row 1: expected .* bytes with XXH3 {entry.row_checksums[1]}"):
        dataset.read(5)
    assert [dataset.read(index)["key"] for index in (4, 6)] == ["corpus:4", "corpus:6"]
    storage.write_bytes(storage.join(s3_uri, entry.name), bytes(data[: entry.row_offsets[3] + 8]))
    with pytest.raises(ShardError, match=r"row 3: expected \d+ bytes .* found 8 with"):
        dataset.read(7)


def test_cache_keeps_within_its_bound(tmp_path: Path) -> None:
    cache = ShardCache(str(tmp_path), max_bytes=250)
    fetched: list[str] = []

    def get(name: str) -> bytes:
        def fetch(path: Path) -> None:
            fetched.append(name)
            path.write_bytes(name.encode() * 100)

        return cache.get(name, 100, fetch).read_bytes()

    for name in ("a", "b", "a", "c"):  # c takes the place of b, the least recently used
        assert get(name) == name.encode() * 100
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["a", "c"]
    get("a")
    get("b")
    assert fetched == ["a", "b", "c", "b"]


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
