"""Images that rows share: the same rows come back, each image is decoded, encoded and stored once, and checked."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jobs.prepare import main
from pipelines import storage
from pipelines.encode import NotEncoded, PatchEncoder
from pipelines.preparation import samples
from pipelines.preparation.data_receipt import DataReceipt
from pipelines.prepare import prepare
from pipelines.shards import Manifest, ShardedDataset
from pipelines.shards.images import ImageObjectError
from tests.corpus import bad_rows, row, write_corpus, write_processor
from tests.preparation import begin, do_chunk, prepare_here, prepare_settings

IMAGES = 5  # of 24 rows, six of which are text only


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """Rows 0, 4, ... share image 0 and so on, across chunks of four rows; the last row's image is cut off."""
    (tmp_path / "images").mkdir()
    rows = [row(number) for number in range(24)]
    for number, each in enumerate(rows):
        if "image" in each:
            each["image"] = f"images/{number % IMAGES}.jpg"
    write_corpus(tmp_path, [*rows, bad_rows(tmp_path)["image_truncated"]])
    write_processor(tmp_path)
    return tmp_path


def objects(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "images").rglob("*") if path.is_file())


@pytest.mark.parametrize("payload", ["original", "pixels", "features"])
def test_rows_read_as_if_each_had_its_own_image(corpus: Path, tiny_checkpoint: Path, payload: str) -> None:
    change: dict[str, Any] = {"payload": payload, "processor": str(tiny_checkpoint)}
    if payload == "features":
        change["encoder"] = {"path": str(tiny_checkpoint), "dtype": "int8"}
    manifests, datasets = {}, {}
    for share in (False, True):
        output = corpus / f"out-{share}"
        manifests[share] = prepare_here(prepare_settings(corpus, output=str(output), share_images=share, **change))
        datasets[share] = ShardedDataset(str(output))
    assert manifests[True].quarantine_reasons == manifests[False].quarantine_reasons == {"image_truncated": 1}
    for mine, theirs in zip(manifests[True].shards, manifests[False].shards, strict=True):
        assert (mine.has_image, mine.num_tokens) == (theirs.has_image, theirs.num_tokens)
    for index in range(24):
        mine, theirs = datasets[True].read(index), datasets[False].read(index)
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            if name == "patch_features":  # encoded in other batches
                np.testing.assert_allclose(value, theirs[name], atol=0.05)
            else:
                np.testing.assert_array_equal(value, theirs[name])
    assert len(objects(corpus / "out-True")) == IMAGES
    assert not (corpus / "out-False" / "images").exists()
    sizes = {share: sum(shard.bytes for shard in manifests[share].shards) for share in (False, True)}
    sizes[True] += sum(path.stat().st_size for path in objects(corpus / "out-True"))
    assert payload != "pixels" or sizes[True] < 0.5 * sizes[False]  # the others are tiny here, next to their rows


@pytest.mark.ray
def test_each_output_gets_its_images(corpus: Path, ray_session: None) -> None:
    """Workers live on from one preparation to the next."""
    for output in ("one", "two"):
        prepare(prepare_settings(corpus, output=str(corpus / output), share_images=True))
        assert len(objects(corpus / output)) == IMAGES
        assert "pixel_values" in ShardedDataset(str(corpus / output)).read(0)


def test_images_that_were_made_otherwise_are_not_taken(corpus: Path) -> None:
    """A run that ended before its first receipt leaves images; with its plan removed, other terms may follow."""
    settings = prepare_settings(corpus, share_images=True)
    prepare_here(settings)
    for path in (corpus / "out").iterdir():
        if path.is_file():
            path.unlink()
        elif path.name != "images":
            shutil.rmtree(path)
    other = {"processor": str(write_processor(corpus / "hd", "hd"))}
    prepare_here(prepare_settings(corpus, share_images=True, **other))
    prepare_here(prepare_settings(corpus, output=str(corpus / "apart"), **other))
    mine, theirs = (ShardedDataset(str(corpus / name)) for name in ("out", "apart"))
    for index in range(24):
        for name, value in theirs.read(index).items():
            np.testing.assert_array_equal(mine.read(index)[name], value)


def test_each_image_is_decoded_once_in_the_whole_run(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []
    decode = samples.decode_image
    monkeypatch.setattr(samples, "decode_image", lambda data: decoded.append(data) or decode(data))
    prepare_here(prepare_settings(corpus, share_images=True))
    assert len(decoded) == IMAGES + 1  # and the one that is cut off


def test_order_of_the_chunks_does_not_matter(corpus: Path) -> None:
    """Whichever row comes first brings the image: a killed and resumed run ends with the same manifest."""
    manifests = []
    for order in (range(7), reversed(range(7))):
        settings = prepare_settings(corpus, output=str(corpus / f"out-{len(manifests)}"), share_images=True)
        for number in order:
            ledger, maker = begin(settings)
            ledger.commit(do_chunk(ledger, maker, number))
        manifests.append(ledger.publish())
    assert manifests[0] == manifests[1]


def test_image_that_the_tower_refuses_takes_all_its_rows_along(
    corpus: Path, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second row of image 1 in a chunk was never given to the tower itself."""
    encode = PatchEncoder.__call__
    refused = corpus / "images" / "1.jpg"
    of_image_1 = samples.decode_image(refused.read_bytes())

    def without_image_1(encoder: PatchEncoder, pixels: np.ndarray) -> list[np.ndarray | NotEncoded]:
        wanted = processor.to_uint8(of_image_1)
        return [
            NotEncoded("non_finite", "made up") if np.array_equal(image, wanted) else features
            for image, features in zip(pixels, encode(encoder, pixels), strict=True)
        ]

    settings = prepare_settings(
        corpus,
        processor=str(tiny_checkpoint),
        payload="features",
        encoder={"path": str(tiny_checkpoint)},
        share_images=True,
        chunk_rows=25,
        max_quarantined_share=0.5,
    )
    processor = begin(settings)[1].processor.image_processor
    monkeypatch.setattr(PatchEncoder, "__call__", without_image_1)
    manifest = prepare_here(settings)
    rows_of_image_1 = sum(number % 4 != 3 and number % IMAGES == 1 for number in range(24))
    assert rows_of_image_1 > 1
    assert manifest.quarantine_reasons == {"image_truncated": 1, "non_finite": rows_of_image_1}
    assert len(objects(corpus / "out")) == IMAGES - 1


@pytest.mark.parametrize("damage", ["deleted", "cut", "flipped", "swapped"])
def test_damage_is_named_by_reader_and_verify(corpus: Path, damage: str, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_here(prepare_settings(corpus, share_images=True))
    dataset = ShardedDataset(str(corpus / "out"))
    victim = objects(corpus / "out")[0]
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    other = objects(corpus / "out")[1].read_bytes()
    if damage == "deleted":
        victim.unlink()
    else:
        victim.write_bytes({"cut": data[:-100], "flipped": data, "swapped": other}[damage])
    with pytest.raises(ImageObjectError, match=f"{victim.name}: expected .*, found "):
        for index in range(24):
            dataset.read(index)
    assert main(["verify", str(corpus / "out")]) == 1
    assert victim.name in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_spoilt_image_is_made_anew_with_the_chunk_that_verify_names(
    corpus: Path, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    settings = prepare_settings(corpus, share_images=True)
    expected = prepare_here(settings)
    victim = objects(corpus / "out")[2]
    whole = victim.read_bytes()
    victim.unlink() if damage == "gone" else victim.write_bytes(whole[:-1])
    capsys.readouterr()
    assert main(["verify", settings.output]) == 1
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith(f"error: {victim}: expected ") and "that chunk alone is then made anew" in error
    victim.unlink(missing_ok=True)
    receipt = Path(error.rpartition(". Its receipt: ")[2])
    assert receipt.parent == corpus / "out" / "receipts"
    for path in (receipt, corpus / "out" / "manifest.json"):
        path.unlink()
    assert begin(settings)[0].pending == [int(receipt.stem)]
    assert prepare_here(settings) == expected
    assert victim.read_bytes() == whole
    assert main(["verify", settings.output]) == 0


def test_gc_keeps_the_images_that_rows_name(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare_here(prepare_settings(corpus, share_images=True))
    orphan = corpus / "out" / "images" / "00" / f"{'0' * 64}.arrow"
    orphan.parent.mkdir(exist_ok=True)
    orphan.write_bytes(b"x")
    assert main(["gc", str(corpus / "out")]) == 0
    assert "1 object removed" in capsys.readouterr().out
    assert not orphan.exists() and len(objects(corpus / "out")) == IMAGES
    assert main(["verify", str(corpus / "out")]) == 0


def test_gc_of_an_unfinished_folder_leaves_shared_images_alone(corpus: Path) -> None:
    """However old: the next chunk may name an image without writing it again."""
    settings = prepare_settings(corpus, share_images=True)
    ledger, maker = begin(settings)
    do_chunk(ledger, maker, 0)  # killed before its receipt
    left = objects(corpus / "out")
    assert left
    assert main(["gc", settings.output, "--older-than", "0"]) == 0
    assert objects(corpus / "out") == left
    assert not list((corpus / "out" / "shards").iterdir())


@pytest.mark.s3
def test_shared_images_on_s3(corpus: Path, s3_uri: str) -> None:
    manifest = prepare_here(prepare_settings(corpus, output=s3_uri, share_images=True))
    receipt = DataReceipt.model_validate_json(storage.read_bytes(storage.join(s3_uri, "receipt.json")))
    assert receipt.shared_images == IMAGES and receipt.shared_image_bytes > IMAGES * 3 * 126 * 126
    assert manifest == Manifest.load(s3_uri)
    local = prepare_here(prepare_settings(corpus, share_images=True))
    assert local.shards == manifest.shards
    remote, near = ShardedDataset(s3_uri, cache_dir=str(corpus / "cache")), ShardedDataset(str(corpus / "out"))
    for index in range(24):
        for name, value in remote.read(index).items():
            np.testing.assert_array_equal(value, near.read(index)[name])
