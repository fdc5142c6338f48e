"""Fields that are called as if they were images, and rows of JSON that would lose one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipelines.corpora.image_names import seems_image
from tests.formats import error, read_rows, records

TEXTS: dict[str, Any] = {
    "questions": {"question": "Q", "answer": "A"},
    "messages": {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    "llava": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
}


@pytest.mark.parametrize(
    "field",
    [
        *("image", "Image", "IMAGE", "images", "img", "imgs", "jpg", "jpeg", "png", "webp", "picture", "photos"),
        *("image_url", "imageUrl", "IMAGE_URL", "imageurl", "image-path", "images_path", "image_paths", "img_path"),
        *("image_bytes", "image_base64", "image_b64", "image_file", "imagefilename", "image_1", "image2", "photo_urls"),
        *(
            "decoded_image",
            "question_image",
            "image_left",
            "id_of_image_file",
            "imagebase64",
            "decodedImage",
            "image_file_path",
        ),
    ],
)
def test_what_seems_to_be_an_image(field: str) -> None:
    assert seems_image(field)


@pytest.mark.parametrize(
    "field",
    [
        *("image_id", "imageId", "image_ids", "ImageID", "image_width", "image_height", "image_size", "img_id"),
        *("has_image", "num_images", "image_count", "image_sha256", "image_md5", "image_caption", "image_description"),
        *("image_caption_en", "image_type", "photo_credit", "imagination", "pictured", "jpgs2text", "id", "url", ""),
    ],
)
def test_what_is_called_otherwise(field: str) -> None:
    assert not seems_image(field)


@pytest.mark.parametrize("form", TEXTS)
@pytest.mark.parametrize(
    "named",
    [
        *({"image_path": "a.jpg"}, {"img": "a.jpg"}, {"image_url": "http://host/a.jpg"}, {"images_path": ["a.jpg"]}),
        *(
            {"photo": {"url": "a.jpg"}},
            {"image_1": "", "image_2": "a.jpg"},
            {"img": "", "image_url": "a.jpg"},
            {"image_path": "a.jpg", "image": None},
            {"file_name": "train/a.JPG"},
            {"source": "coco", "media": [{"kind": "still", "at": "http://host/a.png?width=3"}]},
            {"image_id": "a.webp"},
            {"blob": "data:image/png;base64,AAAA"},
            {"deep": json.loads("[" * 900 + '"a.jpg"' + "]" * 900)},
        ),
    ],
)
def test_a_row_whose_image_has_another_name_is_no_row_of_text(tmp_path: Path, form: str, named: Any) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps(TEXTS[form] | more) for more in ({"id": "r", **named}, {"id": "good"})))
    bad, good = read_rows(form, path)
    field = next(name for name, value in named.items() if value and name != "source")
    assert (error(bad).reason, error(bad).id) == ("row_malformed", "r")
    assert error(bad).detail.startswith(f"the row has '{field}' and no 'image', which alone is read: rename it, or")
    assert records([good])[0].id == "good"


@pytest.mark.parametrize(
    "other",
    [
        *({"image_path": ""}, {"img": None}, {"images_path": []}, {"image_url": [""]}, {"photo": {"url": None}}),
        *({"image_id": "17"}, {"image": "", "image_width": 3}, {"has_image": "no"}, {"image_crop": [0, 1]}),
        *({"id": "a.jpg"}, {"source": "all of png"}, {"note": "see a.jpg"}, {"host": "example.org"}, {"kind": ".png"}),
        {"note": "<b>.png"},
    ],
)
def test_a_row_of_text_may_tell_that_it_has_no_image(tmp_path: Path, other: dict[str, Any]) -> None:
    for form, row in TEXTS.items():
        (tmp_path / "corpus.jsonl").write_text(json.dumps(row | other))
        assert records(read_rows(form, tmp_path / "corpus.jsonl"))[0].image is None


@pytest.mark.parametrize(
    "more",
    [{"images": ["a.jpg"]}, {"image": "a.jpg"}, {"attachments": [{"url": "http://host/a.jpg"}]}, {"img": "AAAA"}],
)
def test_a_turn_with_an_image_of_its_own_is_not_read_without_it(tmp_path: Path, more: dict[str, Any]) -> None:
    for form in ("messages", "llava", "sharegpt"):
        [(field, (question, answer))] = TEXTS[form].items()
        rows = [{field: [question | more, answer]}, {field: [question, answer | more], "image": "b.jpg"}]
        rows.append({field: [question | dict.fromkeys(more), answer]})
        (tmp_path / "corpus.jsonl").write_text("\n".join(map(json.dumps, rows)))
        first, second, good = read_rows(form, tmp_path / "corpus.jsonl")
        [name] = more
        for turn, bad in enumerate((first, second)):
            assert error(bad).reason == "row_malformed"
            assert error(bad).detail.startswith(f"turn {turn} has {name!r}, where no image is looked for: name it")
        assert records([good])[0].image is None


def test_a_row_with_its_image_may_have_other_names_of_it(tmp_path: Path) -> None:
    part = {"type": "image", "image": "a.jpg"}
    question = {"role": "user", "content": [part, {"type": "text", "text": "Q"}]}
    rows: dict[str, Any] = {"messages": {"messages": [question]}, "questions": TEXTS["questions"] | {"image": "a.jpg"}}
    for form, row in rows.items():
        (tmp_path / "corpus.jsonl").write_text(json.dumps(row | {"image_url": "http://host/a.jpg"}))
        assert records(read_rows(form, tmp_path / "corpus.jsonl"))[0].image == "a.jpg"
