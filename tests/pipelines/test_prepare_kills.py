"""A preparation that is killed at each step of its protocol goes on to the manifest of one that was not."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from pipelines import storage
from pipelines.preparation import samples
from pipelines.shards import Manifest, ManifestError, ShardedDataset
from tests.corpus import bad_rows, row, write_corpus, write_processor
from tests.kills import Kill, run_apart, run_together
from tests.preparation import prepare_here, prepare_settings

NUM_ROWS = 11
NUM_IMAGES = [3, 3, 4]  # of each chunk: every fourth row is text only, but for the bad one
STEPS = [
    r"plan\.json",
    r"config\.yaml",
    "shards/",
    "receipts/0+0",
    "receipts/0+2",
    r"quarantine\.parquet",
    r"receipt\.html",
    r"manifest\.json",
]
PROTOCOL = [r"plan\.json", "shards/", "receipts/0+1", r"quarantine\.parquet", r"manifest\.json"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three chunks; the last row is bad."""
    folder = tmp_path_factory.mktemp("corpus")
    (folder / "images").mkdir()
    write_corpus(folder, [*(row(number) for number in range(NUM_ROWS)), bad_rows(folder)["image_truncated"]])
    write_processor(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return prepare_here(prepare_settings(corpus, output=str(tmp_path_factory.mktemp("undisturbed"))))


def run(corpus: Path, output: str) -> tuple[Manifest, int]:
    """A run in this process: the manifest, and how many images were decoded."""
    decode, decoded = samples.decode_image, []

    def counted(data: bytes) -> Any:
        decoded.append(data)
        return decode(data)

    samples.decode_image = counted
    return prepare_here(prepare_settings(corpus, output=output)), len(decoded)


def check_unpublished(output: str) -> None:
    """Of a run that was killed nothing looks finished, and no shard that is visible is partial."""
    if not storage.exists(storage.join(output, "manifest.json")):
        with pytest.raises(ManifestError, match="no manifest"):
            ShardedDataset(output)
    for name in storage.list_names(storage.join(output, "shards")):
        if not name.endswith(".part"):
            assert storage.sha256(storage.read_bytes(storage.join(output, "shards", name))) == name[: -len(".arrow")]


def check_published(output: str, manifest: Manifest, undisturbed: Manifest, cache: Path) -> None:
    assert manifest == undisturbed == Manifest.load(output)
    dataset = ShardedDataset(output, cache_dir=str(cache))
    keys = [dataset.read(index)["key"] for index in range(len(dataset))]
    assert keys == [f"corpus:{number}" for number in range(NUM_ROWS)]


CASES = [
    *(("local", *case) for case in itertools.product(STEPS, ["before", "midway", "after"])),
    *(("s3", *case) for case in itertools.product(PROTOCOL, ["before", "after"])),
]


@pytest.mark.parametrize(
    ("place", "step", "when"),
    [pytest.param(*case, marks=[pytest.mark.s3] if case[0] == "s3" else [], id="-".join(case)) for case in CASES],
)
def test_killed_run_is_resumed(
    request: pytest.FixtureRequest,
    corpus: Path,
    undisturbed: Manifest,
    tmp_path: Path,
    place: str,
    step: str,
    when: Any,
) -> None:
    is_local = place == "local"
    output = str(tmp_path / "out") if is_local else request.getfixturevalue("s3_uri")
    env: dict[str, str] = {} if is_local else request.getfixturevalue("s3").env
    run_apart(run, corpus, output, kill=Kill(step, when), env=env)
    check_unpublished(output)
    receipts = [name for name in storage.list_names(storage.join(output, "receipts")) if name.endswith(".json")]
    manifest, num_decoded = run_apart(run, corpus, output, env=env)
    check_published(output, manifest, undisturbed, tmp_path / "cache")
    # What has a receipt was not done again: at most the chunk that was under way is.
    assert num_decoded == sum(NUM_IMAGES[len(receipts) :])


@pytest.mark.parametrize("place", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_two_runs_at_once_end_with_one_manifest(
    request: pytest.FixtureRequest, corpus: Path, undisturbed: Manifest, tmp_path: Path, place: str
) -> None:
    env: dict[str, str] = {} if place == "local" else request.getfixturevalue("s3").env
    for round_number in range(3):
        root = str(tmp_path) if place == "local" else request.getfixturevalue("s3_uri")
        output = storage.join(root, f"round-{round_number}")
        first, second = run_together(2, run, corpus, output, env=env)
        assert first[0] == second[0]
        check_published(output, first[0], undisturbed, tmp_path / "cache")
