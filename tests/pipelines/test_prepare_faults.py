"""Inputs that change, buckets that are closed, stores that fail, disks that fill: an error that names the thing, and
nothing published. Without Ray: the protocol is the same, and tests/jobs shows it with Ray.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs.prepare import main
from pipelines import prepare as prepare_module
from pipelines import storage
from pipelines.encode import EncoderError
from pipelines.preparation import samples
from pipelines.preparation.plan import load_plan
from pipelines.preparation.receipt_book import PublishError
from pipelines.preparation.sources import PlanError
from pipelines.prepare import prepare
from pipelines.shards import Manifest, ShardedDataset, ShardError
from pipelines.shards.receipts import Receipt
from tests.corpus import bad_rows, row, write_corpus, write_processor
from tests.fixtures.fault_proxy import Fault, FaultProxy
from tests.fixtures.s3 import S3
from tests.fixtures.small_disk import SmallDisk
from tests.fixtures.tiny import build_processor, build_tiny_model
from tests.kills import run_apart
from tests.preparation import begin, do_chunk, prepare_here, prepare_settings

PLACES = ["local", pytest.param("s3", marks=pytest.mark.s3)]
NUM_ROWS = 10


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Ten good rows in three chunks."""
    write_corpus(tmp_path, NUM_ROWS)
    write_processor(tmp_path)
    return tmp_path


@pytest.fixture(params=PLACES)
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3_uri")


def upload(folder: Path, uri: str) -> dict[str, str]:
    """Copy the corpus in `folder` to `uri`; the source that it is there."""
    for file in (folder / "corpus.jsonl", *(folder / "images").iterdir()):
        storage.write_bytes(storage.join(uri, str(file.relative_to(folder))), file.read_bytes())
    return {"path": storage.join(uri, "corpus.jsonl"), "image_root": uri}


def num_receipts(output: str) -> int:
    return len([name for name in storage.list_names(storage.join(output, "receipts")) if name.endswith(".json")])


def check_unpublished(output: str, receipts: int) -> None:
    assert num_receipts(output) == receipts
    assert not storage.exists(storage.join(output, "manifest.json"))


def check_rows(output: str, manifest: Manifest, cache: Path) -> None:
    assert Manifest.load(output) == manifest
    dataset = ShardedDataset(output, cache_dir=str(cache))
    assert [dataset.read(index)["key"] for index in range(len(dataset))] == [f"corpus:{n}" for n in range(NUM_ROWS)]


def test_corpus_that_changes_under_way_is_named(corpus: Path, place: str, tmp_path: Path) -> None:
    source = (
        upload(corpus, place) if place.startswith("s3") else {"path": f"{corpus}/corpus.jsonl", "image_root": place}
    )
    settings = prepare_settings(corpus, sources=[source], output=storage.join(place, "out"))
    ledger, maker = begin(settings)
    ledger.commit(do_chunk(ledger, maker, 0))
    same_size = storage.read_bytes(source["path"]).replace(b"How many", b"How much")
    for changed in (same_size, same_size[:-200], same_size + b"\n"):
        storage.write_bytes(source["path"], changed)
        with pytest.raises(PlanError, match=f"{source['path']} has changed since the plan was made"):
            do_chunk(ledger, maker, 2)
    storage.filesystem(source["path"])[0].rm_file(storage.filesystem(source["path"])[1])
    with pytest.raises(FileNotFoundError, match=source["path"]):
        do_chunk(ledger, maker, 2)
    check_unpublished(settings.output, receipts=1)


@pytest.mark.parametrize(("num_bad", "is_published"), [(2, True), (3, False)])
def test_more_than_a_tenth_of_bad_rows_publishes_nothing(tmp_path: Path, num_bad: int, is_published: bool) -> None:
    (tmp_path / "images").mkdir()
    bad = bad_rows(tmp_path)["image_truncated"]
    write_corpus(tmp_path, [*(row(number) for number in range(20 - num_bad)), *[bad] * num_bad])
    write_processor(tmp_path)
    settings = prepare_settings(tmp_path)
    if is_published:
        assert prepare_here(settings).quarantined == num_bad
        return
    with pytest.raises(PublishError, match=r"3 of 20 rows are quarantined \(image_truncated 3\).*0\.1 allows"):
        prepare_here(settings)
    check_unpublished(settings.output, receipts=5)


def test_corpus_of_bad_rows_alone_publishes_nothing_at_any_share(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    bad = list(bad_rows(tmp_path).values())
    write_corpus(tmp_path, bad)
    write_processor(tmp_path)
    settings = prepare_settings(tmp_path, max_quarantined_share=1.0, max_length=500)
    with pytest.raises(PublishError, match=f"{len(bad)} of {len(bad)} rows are quarantined"):
        prepare_here(settings)
    check_unpublished(settings.output, receipts=-(-len(bad) // 4))


def test_empty_corpus_is_named(tmp_path: Path) -> None:
    write_corpus(tmp_path, 0)
    write_processor(tmp_path)
    settings = prepare_settings(tmp_path)
    with pytest.raises(PlanError, match=f"source 'corpus': {tmp_path}/corpus.jsonl holds no rows"):
        prepare_here(settings)
    assert not (tmp_path / "out").exists()


def test_a_corpus_whose_pattern_matches_the_output_is_refused_before_anything_is_written(corpus: Path) -> None:
    before = sorted(corpus.rglob("*"))
    source = {"path": f"{corpus}/*.json*", "name": "mix", "image_root": str(corpus)}
    with pytest.raises(PlanError, match=rf"source 'mix': .* matches {corpus}/plan\.json, which will be written there"):
        prepare_here(prepare_settings(corpus, sources=[source], output=str(corpus)))
    assert sorted(corpus.rglob("*")) == before
    assert prepare_here(prepare_settings(corpus, sources=[source])).written == NUM_ROWS


@pytest.mark.s3
def test_closed_bucket_is_named(corpus: Path, s3: S3, tmp_path: Path) -> None:
    """The server itself says no, to a credential that it knows and the bucket does not."""
    closed, readable = s3.new_bucket(), s3.new_bucket(acl="public-read")
    source, images = upload(corpus, readable), upload(corpus, closed)["image_root"]

    def attempt(**change: Any) -> None:
        run_apart(prepare_here, prepare_settings(corpus, **{"sources": [source]} | change), env=s3.stranger)

    with pytest.raises(RuntimeError, match=rf"PlanError: source 'corpus': {closed}/corpus.jsonl cannot be read \(Perm"):
        attempt(sources=[{**source, "path": f"{closed}/corpus.jsonl"}])
    with pytest.raises(RuntimeError, match=f"PermissionError: .*'{readable}/out/pins/\\w{{64}}.arrow'"):
        attempt(output=f"{readable}/out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(RuntimeError, match=r"PublishError: .* 8 of 10 rows are quarantined \(image_forbidden 8\)"):
        attempt(sources=[{**source, "image_root": images}])
    check_unpublished(str(tmp_path / "out"), receipts=3)
    plan = load_plan(str(tmp_path / "out"))
    assert plan and plan.pins and plan.pins.unpinned == 8  # nor may they be listed
    run_apart(prepare_here, prepare_settings(corpus, sources=[source], output=f"{tmp_path}/read"), env=s3.stranger)
    check_rows(f"{tmp_path}/read", Manifest.load(f"{tmp_path}/read"), tmp_path)


def other_layout(folder: Path, patch: pytest.MonkeyPatch) -> None:
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | {"layout": "caption"}))


def other_corpus(folder: Path, patch: pytest.MonkeyPatch) -> None:
    with (folder / "corpus.jsonl").open("a") as file:
        file.write(json.dumps(row(NUM_ROWS)))


def other_image_root(folder: Path, patch: pytest.MonkeyPatch) -> None:
    recipe = yaml.safe_load((folder / "recipe.yaml").read_text())
    recipe["sources"][0]["image_root"] = str(folder / "images")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def other_code(folder: Path, patch: pytest.MonkeyPatch) -> None:
    read = Path.read_bytes
    patch.setattr(Path, "read_bytes", lambda path: read(path) + (b"# changed" if path.name == "samples.py" else b""))


def other_tower(folder: Path, patch: pytest.MonkeyPatch) -> None:
    model = build_tiny_model(build_processor())
    next(model.model.vision_tower.parameters()).data.add_(1.0)
    model.save_pretrained(folder / "model")


def other_tokenizer(folder: Path, patch: pytest.MonkeyPatch) -> None:
    processor = build_processor()
    processor.tokenizer.add_tokens(["blue-green"])
    processor.save_pretrained(folder / "processor")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (other_corpus, r"terms: source 'corpus' \(\S+/corpus\.jsonl\): fingerprint: was '\d+-\S+', now '\S+'\. Run"),
        (other_image_root, r"terms: source 'corpus' \(\S+\): image_root: was '\S+', now '\S+/images'\. Run"),
        (other_layout, r"terms: layout: was 'chat', now 'caption'\. Run"),
        (other_code, r"terms: code: was '\w{64}', now '\w{64}'\. Run"),
        (other_tower, r"terms: encoder_identity: was '\w{64}', now '\w{64}'\. Run"),
        (other_tokenizer, r"terms: processor_identity: was '\w{64}', now '\w{64}'\. Run"),
    ],
)
def test_resume_with_other_terms_lists_them(
    corpus: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[Path, pytest.MonkeyPatch], None],
    message: str,
) -> None:
    build_tiny_model(build_processor()).save_pretrained(corpus / "model")
    settings = prepare_settings(corpus, payload="features", encoder={"path": str(corpus / "model")})
    ledger, _ = begin(settings)
    assert ledger.pending == [0, 1, 2]
    shutil.copy(corpus / "out" / "config.yaml", corpus / "recipe.yaml")
    change(corpus, monkeypatch)
    monkeypatch.setattr(prepare_module, "start_ray", lambda: pytest.fail("it went on"))
    capsys.readouterr()  # what saving the models has printed
    assert main(["--config", str(corpus / "recipe.yaml")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {corpus}/out: this folder was begun with other {message[:5]}")
    assert re.search(message, error), error
    check_unpublished(settings.output, receipts=0)


def test_failing_accelerator_is_an_error_after_three_tries(
    corpus: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As Ray would bring it from workers whose GPU is broken."""
    build_tiny_model(build_processor()).save_pretrained(corpus / "model")
    settings = prepare_settings(corpus, payload="features", encoder={"path": str(corpus / "model")})
    begin(settings)
    broken = "encoder: the tower of model failed on cuda: CUDA error: unspecified launch failure"
    tries = []

    def failing(*arguments: Any) -> Iterator[Receipt]:
        tries.append(arguments[1])
        raise EncoderError(broken)

    monkeypatch.setattr(prepare_module, "start_ray", lambda: None)
    monkeypatch.setattr(prepare_module, "run_chunks", failing)
    capsys.readouterr()
    assert main(["--config", str(corpus / "out" / "config.yaml")]) == 1
    assert capsys.readouterr().err == f"error: {broken}\n"
    assert tries == [[0, 1, 2]] * 3
    check_unpublished(settings.output, receipts=0)


def truncate(data: bytes) -> bytes:
    return data[:-100]


def flip_a_bit(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (None, "expected {bytes} bytes with sha256 {sha256}, found no such file"),
        (truncate, "expected {bytes} bytes with sha256 {sha256}, found {cut_bytes} with {cut}"),
        (flip_a_bit, "expected {bytes} bytes with sha256 {sha256}, found {bytes} with {flipped}"),
    ],
)
def test_shard_that_is_spoilt_after_publication_is_named(
    corpus: Path, place: str, tmp_path: Path, damage: Callable[[bytes], bytes] | None, message: str
) -> None:
    settings = prepare_settings(corpus, output=storage.join(place, "out"))
    entry = prepare_here(settings).shards[1]
    uri = storage.join(settings.output, entry.name)
    data = storage.read_bytes(uri)
    if damage is None:
        file_system, path = storage.filesystem(uri)
        file_system.rm_file(path)
    else:
        storage.write_bytes(uri, damage(data))
    dataset = ShardedDataset(settings.output, cache_dir=str(tmp_path / "cache"))
    assert dataset.read(0)["key"] == "corpus:0"
    with pytest.raises(ShardError) as raised:
        dataset.read(5)
    hashes = {"cut": storage.sha256(truncate(data)), "flipped": storage.sha256(flip_a_bit(data))}
    facts = {"cut_bytes": entry.bytes - 100, **hashes, **entry.model_dump()}
    assert f"{uri}: {message.format(**facts)}" in str(raised.value)
    assert main(["verify", settings.output]) == 1


def test_full_disk_is_named_and_resumed(corpus: Path, small_disk: SmallDisk, tmp_path: Path) -> None:
    """There is room for one of the three shards and not for two."""
    expected = prepare_here(prepare_settings(corpus))
    settings = prepare_settings(corpus, output=str(small_disk.path / "out"))
    with pytest.raises(OSError, match=rf"No space left on device: '{small_disk.path}/out/shards/\w{{64}}\.arrow'"):
        prepare_here(settings)
    check_unpublished(settings.output, receipts=1)
    assert len(storage.list_names(f"{settings.output}/shards")) == 1  # neither a partial shard nor its beginnings
    small_disk.resize("10m")
    assert prepare_here(settings) == expected
    check_rows(settings.output, expected, tmp_path)


@pytest.mark.s3
def test_storm_that_passes_costs_nothing_but_time(
    corpus: Path, s3_uri: str, faults: FaultProxy, tmp_path: Path
) -> None:
    source = upload(corpus, s3_uri)
    settings = prepare_settings(corpus, sources=[source], output=storage.join(s3_uri, "quiet"))
    expected = prepare_here(settings)
    reads: dict[Fault, str] = {"slow_down": "0.jpg", "silence": "1.jpg", "reset": "2.jpg", "stalled_body": r"\.jsonl"}
    reads |= {"reset_body": "4.jpg", "short_body": "5.jpg"}
    for fault, path in reads.items():
        faults.inject(fault, "GET", path, times=2)
    for path in ("plan", "shards", "receipts", "quarantine", "manifest"):
        faults.inject("slow_down", "PUT", path, times=1)
        faults.inject("lost_answer", "PUT", path, times=1)
    stormy = prepare_settings(corpus, sources=[source], output=storage.join(s3_uri, "stormy"))
    assert prepare_here(stormy) == expected
    check_rows(stormy.output, expected, tmp_path)
    assert not any(rule.left for rule in faults.rules)


@pytest.mark.s3
@pytest.mark.parametrize(
    ("fault", "method", "path", "receipts"),
    [
        ("slow_down", "PUT", "shards/", 0),
        ("silence", "PUT", "receipts/0+1", 1),
        ("reset", "PUT", "manifest.json", 3),
        ("reset_body", "GET", "images/5.jpg", 1),
        ("short_body", "GET", "images/5.jpg", 1),
        ("expired", "GET", "images/5.jpg", 1),
    ],
)
def test_storm_that_stays_names_the_object_and_is_resumed(
    corpus: Path,
    s3_uri: str,
    faults: FaultProxy,
    tmp_path: Path,
    fault: Fault,
    method: str,
    path: str,
    receipts: int,
) -> None:
    settings = prepare_settings(corpus, sources=[upload(corpus, s3_uri)], output=storage.join(s3_uri, "out"))
    faults.inject(fault, method, path)
    with pytest.raises(storage.StorageError, match=f"^{s3_uri}/.*{path}"):
        prepare_here(settings)
    faults.heal()
    check_unpublished(settings.output, receipts)
    for name in storage.list_names(storage.join(settings.output, "shards")):
        assert storage.sha256(storage.read_bytes(storage.join(settings.output, "shards", name))) == name[:64]
    check_rows(settings.output, prepare_here(settings), tmp_path)


def test_finished_corpus_is_not_looked_at_again(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = prepare_settings(corpus)
    decode, decoded = samples.decode_image, []

    def counted(data: bytes) -> Any:
        decoded.append(data)
        return decode(data)

    monkeypatch.setattr(samples, "decode_image", counted)
    manifest = prepare_here(settings)
    assert len(decoded) == 8
    monkeypatch.setattr(prepare_module, "start_ray", lambda: pytest.fail("a finished corpus needs no Ray"))
    assert prepare(settings) == manifest
    assert len(decoded) == 8


def test_resumed_run_repeats_no_chunk_that_has_a_receipt(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = prepare_settings(corpus)
    decode, decoded = samples.decode_image, []

    def stopping(data: bytes) -> Any:
        decoded.append(data)
        if len(decoded) == 5:
            raise KeyboardInterrupt  # in the second chunk
        return decode(data)

    monkeypatch.setattr(samples, "decode_image", stopping)
    with pytest.raises(KeyboardInterrupt):
        prepare_here(settings)
    assert prepare_here(settings).written == NUM_ROWS
    repeated = [data for data in decoded]
    assert len(repeated) - len(set(repeated)) == 2  # the images of the chunk that was under way, done so far
