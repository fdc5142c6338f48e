"""Rows -> samples, without Ray: every row keeps its place, bad ones with their reason."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.image_processing_flashsloth import decode_image
from pipelines import storage
from pipelines.preparation.chain import FeatureActor
from pipelines.preparation.chunks import index_files
from pipelines.preparation.row_images import SourceFiles, fetch_image
from pipelines.preparation.samples import WORK_SCHEMA, SampleMaker
from pipelines.preparation.settings import EncoderSettings, SourceSettings
from pipelines.preparation.sources import PlanError, source_terms
from pipelines.records import RowError
from pipelines.shards.receipts import account
from tests.corpus import Row, bad_rows, encoded, row, write_corpus
from tests.memory import peak_growth
from tests.preparation import plan_terms


def make(
    path: Path, processor: FlashSlothProcessor, root: Path | None, format: str = "llava", **change: Any
) -> list[dict[str, Any]]:
    """All samples of the corpus at `path`, as one chunk."""
    [source] = source_terms([SourceSettings(path=str(path), format=format, image_root=str(root) if root else None)])
    terms = plan_terms([source], chunk_rows=100, **change)
    [chunk] = index_files(range(1), [source], [str(path)], 100)
    maker = SampleMaker(terms, [SourceFiles(str(path), str(root) if root else None)], processor)
    return maker(0, chunk).to_pylist()


def test_samples_hold_what_the_processor_gives(tmp_path: Path, processor: FlashSlothProcessor) -> None:
    samples = make(write_corpus(tmp_path, 8), processor, tmp_path)
    assert [sample["key"] for sample in samples] == [f"corpus:{number}" for number in range(8)]
    assert [sample["id"] for sample in samples] == [f"own-{number % 3}" for number in range(8)]
    for number, sample in enumerate(samples):
        messages = [
            {"role": "user", "content": "What color is the square?" if number % 4 != 3 else "What color is a square?"},
            {"role": "assistant", "content": "The square is red."},
            {"role": "user", "content": "How many?"},
            {"role": "assistant", "content": f"{number} circles."},
        ]
        assert sample["reason"] is None
        assert sample["messages"] == messages
        for name, values in processor.encode(messages, has_image=number % 4 != 3).items():
            assert sample[name] == values
        if number % 4 == 3:
            assert sample["image"] is None
        else:
            pixels = processor.image_processor.to_uint8(decode_image(encoded(number)))
            assert sample["image"] == pixels.tobytes()
            assert (sample["image_shape"], sample["image_dtype"]) == ([1, 3, 126, 126], "uint8")


def test_original_bytes_stay_as_they_are(tmp_path: Path, processor: FlashSlothProcessor) -> None:
    samples = make(write_corpus(tmp_path, 2), processor, tmp_path, payload="original")
    assert [sample["image"] for sample in samples] == [encoded(0), encoded(1)]


def test_caption_layout_keeps_the_instruction_in_the_messages(tmp_path: Path, processor: FlashSlothProcessor) -> None:
    turns = [{"from": "human", "value": "Describe it.\n<image>"}, {"from": "gpt", "value": "a red square"}]
    [sample] = make(write_corpus(tmp_path, [row(0, conversations=turns)]), processor, tmp_path, layout="caption")
    assert sample["messages"][0] == {"role": "user", "content": "Describe it."}
    assert sample["input_ids"] == processor.encode(sample["messages"], True, "caption")["input_ids"]


def test_an_image_without_text_says_what_writes_one(tmp_path: Path, processor: FlashSlothProcessor) -> None:
    path = tmp_path / "photos.parquet"
    pq.write_table(pa.table({"image": [{"bytes": encoded(0), "path": "a.jpg"}]}), path)
    [sample] = make(path, processor, tmp_path, format="parquet")
    assert sample["reason"] == "conversation_empty"
    assert sample["detail"].endswith("an image without text is for jobs/annotate.py, which writes one")


def test_a_caption_in_the_chat_layout_says_which_layout_it_is_for(
    tmp_path: Path, processor: FlashSlothProcessor
) -> None:
    turns = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "a red square"}]
    path = write_corpus(tmp_path, [row(0, conversations=turns)])
    [sample] = make(path, processor, tmp_path)
    assert sample["reason"] == "empty_question"
    assert sample["detail"].endswith("; a corpus of captions is prepared with layout: caption")
    [sample] = make(path, processor, tmp_path, layout="caption")
    assert sample["reason"] is None


def test_each_bad_row_has_its_reason_and_harms_no_neighbour(tmp_path: Path, processor: FlashSlothProcessor) -> None:
    (tmp_path / "images").mkdir()
    bad = bad_rows(tmp_path)
    rows: list[Row | str] = [row(0)]
    for each in bad.values():
        rows += [each, row(len(rows) + 1)]
    path = write_corpus(tmp_path, rows)
    samples = make(path, processor, tmp_path)
    assert [sample["reason"] for sample in samples[1::2]] == list(bad)
    assert all(sample["reason"] is None for sample in samples[::2])
    assert [sample["location"] for sample in samples] == [f"{path}:{line}" for line in range(1, len(rows) + 1)]
    assert samples[1]["detail"].startswith("'images/nowhere.jpg': no such file below")
    assert samples[1]["id"] == "own-0"
    keys = [sample["key"] for sample in samples]
    account(keys, keys[::2], keys[1::2])


@pytest.mark.parametrize(
    "image",
    [
        "../a.jpg",
        "a/../../b.jpg",
        "/etc/passwd",
        "file:///etc/passwd",
        "http://host/a.jpg",
        "s3://b/a.jpg",
        "data:image/png;base64,AAAA",
        "DATA:,x",
        "file:a.jpg",
        "..\\a.jpg",
    ],
)
def test_path_that_leaves_the_image_root(tmp_path: Path, image: str) -> None:
    with pytest.raises(RowError) as raised:
        fetch_image(str(tmp_path / "images"), image)
    assert raised.value.reason == "path_not_allowed"


@pytest.mark.parametrize("image", ["nowhere.jpg", "images", "images/0.jpg/0.jpg", "x" * 5000, "zip::images/0.jpg", "*"])
def test_path_without_a_file(tmp_path: Path, image: str) -> None:
    write_corpus(tmp_path, 1)
    with pytest.raises(RowError) as raised:
        fetch_image(str(tmp_path), image)
    assert raised.value.reason == "image_missing"


def test_a_file_without_an_end_is_not_read(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(tmp_path):
        listener.bind("socket.jpg")  # a whole path may be too long for one
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    with (tmp_path / "large.jpg").open("wb") as file:
        file.truncate(2**40)

    def reasons() -> None:
        for name, reason in (
            *((f"{name}.jpg", "image_not_a_file") for name in ("socket", "device")),
            ("large.jpg", "image_too_many_bytes"),
        ):
            with pytest.raises(RowError) as raised:
                fetch_image(str(tmp_path), name)
            assert raised.value.reason == reason

    assert peak_growth(reasons) < 20 * 2**20


@pytest.mark.parametrize("image", ["a..b c.jpg", "a:b.jpg", "database:1.jpg"])
def test_file_names_with_dots_blanks_and_colons(tmp_path: Path, image: str) -> None:
    (tmp_path / image).write_bytes(b"x")
    assert fetch_image(str(tmp_path), image) == b"x"


@pytest.mark.s3
def test_images_on_s3(s3_uri: str) -> None:
    storage.write_bytes(storage.join(s3_uri, "images", "0.jpg"), b"x")
    assert fetch_image(s3_uri, "images/0.jpg") == b"x"
    with pytest.raises(RowError) as raised:
        fetch_image(s3_uri, "images/1.jpg")
    assert raised.value.reason == "image_missing"


def test_images_without_a_root_are_an_error_of_the_recipe(tmp_path: Path, processor: FlashSlothProcessor) -> None:
    with pytest.raises(PlanError, match=r"source 'corpus'.*corpus\.jsonl:1 has an image.*set it"):
        make(write_corpus(tmp_path, 1), processor, None)


def test_source_that_changes_after_the_plan_is_an_error(tmp_path: Path, processor: FlashSlothProcessor) -> None:
    path = write_corpus(tmp_path, 2)
    [source] = source_terms([SourceSettings(path=str(path), image_root=str(tmp_path))])
    terms = plan_terms([source.model_copy(update={"fingerprint": "0-0"})], chunk_rows=2)
    [chunk] = index_files(range(1), [source], [str(path)], 2)
    with pytest.raises(PlanError, match=r"'corpus'.*corpus\.jsonl has changed since the plan was made"):
        SampleMaker(terms, [SourceFiles(str(path), str(tmp_path))], processor)(0, chunk)


def features_of(samples: list[dict[str, Any]], tower: Path) -> list[dict[str, Any]]:
    table = pa.Table.from_pylist(samples, schema=WORK_SCHEMA)
    features = FeatureActor(EncoderSettings(path=str(tower), batch_size=2))(table)
    assert features.schema == WORK_SCHEMA
    return features.to_pylist()


def test_features_are_the_models(tmp_path: Path, processor: FlashSlothProcessor, tiny_checkpoint: Path) -> None:
    samples = make(write_corpus(tmp_path, 5), processor, tmp_path, payload="features")
    model = FlashSlothForConditionalGeneration.from_pretrained(tiny_checkpoint)
    for number, sample in enumerate(features_of(samples, tiny_checkpoint)):
        if number == 3:
            assert sample["image"] is None
            continue
        pixels = processor.image_processor([decode_image(encoded(number))])["pixel_values"]
        features = np.frombuffer(sample["image"], np.float16).reshape(sample["image_shape"])
        expected = model.get_patch_features(pixels)[0].detach().numpy()
        np.testing.assert_allclose(features, expected, atol=2e-3)
        assert (sample["image_dtype"], sample["reason"]) == ("float16", None)


def test_features_that_are_not_finite_are_quarantined(
    tmp_path: Path, processor: FlashSlothProcessor, tiny_model: FlashSlothForConditionalGeneration
) -> None:
    for name, parameter in tiny_model.model.vision_tower.named_parameters():
        if "patch_embedding" in name:
            parameter.data.fill_(1e30)
    tiny_model.save_pretrained(tmp_path / "broken")
    samples = make(write_corpus(tmp_path, 4), processor, tmp_path, payload="features")
    reasons = [sample["reason"] for sample in features_of(samples, tmp_path / "broken")]
    assert reasons == ["non_finite", "non_finite", "non_finite", None]  # the last is text only
