"""One row out for every row in: what is asked, what is written, and that it reads back as a corpus. Without Ray."""

from __future__ import annotations

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flashsloth import FlashSlothProcessor
from flashsloth.image_processing_flashsloth import decode_image
from pipelines import annotate as annotate_module
from pipelines import storage
from pipelines.annotation.questions import ask, row_seed
from pipelines.annotation.settings import AnnotateSettings
from pipelines.annotation.verify import verify
from pipelines.preparation.receipt_book import PublishError
from pipelines.preparation.sources import PlanError
from pipelines.records import Message, Record, RowError
from pipelines.serving.engine import Engine
from pipelines.serving.prompts import Encoder
from pipelines.serving.sampling import Sampling
from pipelines.shards import ManifestError, ShardedDataset
from tests.annotation import annotate_here, annotate_settings, begin, rows_of
from tests.corpus import bad_rows, encoded, row, write_corpus, write_processor
from tests.preparation import prepare_here, prepare_settings

NUM_ROWS = 10


@pytest.fixture
def corpus(tmp_path: Path, tiny_checkpoint: Path) -> Path:
    """Ten good rows in three chunks, and the checkpoint; rows 3 and 7 have no image."""
    write_corpus(tmp_path, NUM_ROWS)
    (tmp_path / "model").symlink_to(tiny_checkpoint)
    return tmp_path


def record(*contents: str, image: str | None = "a.jpg") -> Record:
    roles = ("user", "assistant")
    return Record([Message(role=roles[i % 2], content=text) for i, text in enumerate(contents)], "own", image)


@pytest.mark.parametrize(
    ("given", "prompt", "asked"),
    [
        (record("Q?", "A."), None, ["Q?"]),
        (record("Q?", "A.", "And?", "B."), None, ["Q?", "A.", "And?"]),
        (record("Q?", "A.", "And?"), None, ["Q?", "A.", "And?"]),
        (record("Q?", image=None), None, ["Q?"]),
        (record(), "Describe it.", ["Describe it."]),
        (record("Q?", "A."), "Describe it.", ["Describe it."]),
        (record("Q?", "A.", "And?", "B."), "{question} One word, {{please}}.", ["And? One word, {please}."]),
        (record("Q?", image=None), "{question} One word.", ["Q? One word."]),
        (record(), "This is {id}.", ["This is own."]),
        (record(), "This is {id:>5}, {id!r}.", ["This is   own, 'own'."]),
        (record("a {brace} and {}", "A."), "{question}", ["a {brace} and {}"]),
    ],
)
def test_what_is_asked_about_a_row(given: Record, prompt: str | None, asked: list[str]) -> None:
    assert [message["content"] for message in ask(given, prompt)] == asked


@pytest.mark.parametrize(
    ("given", "prompt", "reason"),
    [
        (record(), None, "no_question"),
        (record(" ", "A."), None, "no_question"),
        (record(), "{question}", "no_question"),
        (record(), "{question!r}", "no_question"),
        (record("Q?", image=None), "Describe it.", "no_image"),
    ],
)
def test_row_that_cannot_be_asked(given: Record, prompt: str | None, reason: str) -> None:
    with pytest.raises(RowError) as raised:
        ask(given, prompt)
    assert raised.value.reason == reason


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": "What is {title}?"}, r"there is no field \{title\}; there are \{question\} and \{id\}"),
        ({"prompt": "What is {?"}, "written twice"),
        ({"prompt": "{id:>5d}"}, r"prompt\n.*\{id:>5d\} cannot be written: Unknown format code 'd'.*: write \{id\}"),
        ({"prompt": "Why? {question!x}"}, r"prompt\n.*\{question!x\} cannot be written: Unknown conversion"),
        ({"prompt": "{id:{question}}"}, r"prompt\n.*\{id:\{question\}\} is laid out by another field; write \{id\}"),
        ({"checkpoint": None}, "exactly one of checkpoint and endpoint"),
        ({"endpoint": {"url": "http://127.0.0.1:1/v1"}}, "exactly one of checkpoint and endpoint"),
        ({"sources": [{"path": "photos", "format": "images", "image_root": "photos"}]}, "give a prompt"),
        ({"sources": [{"path": "a.json"}, {"path": "b/a.json"}]}, "two sources have the name 'a'"),
        ({"workers": {"min_workers": 2, "max_workers": 1}}, "min_workers is 2, more than max_workers 1"),
        ({"format": "csv"}, "parquet"),
        ({"stop": ["a", ""]}, r"stop\.1\n.*at least 1 character"),
        ({"temperature": float("inf")}, "temperature\n.*finite number"),
        ({"endpoint": {"url": "127.0.0.1:8000/v1"}}, r"endpoint\.url\n.*begins with http:// or https:// and a host"),
        ({"endpoint": {"url": "http:///v1"}}, r"endpoint\.url\n.*begins with http:// or https:// and a host"),
        ({"endpoint": {"url": "http://h:80:/v1"}}, r"endpoint\.url\n.*'80:'; it has a host and, after a colon, a port"),
        ({"endpoint": {"url": "http://h:99999/v1"}}, r"endpoint\.url\n.*Port out of range 0-65535; it has a host"),
        ({"endpoint": {"url": "http://../v1"}}, r"endpoint\.url\n.*label empty or too long.*; it has a host"),
        ({"endpoint": {"url": "http://:8000/v1"}}, r"endpoint\.url\n.*it has a host and nowhere a space"),
        ({"endpoint": {"url": "http://h/v1\n"}}, r"endpoint\.url\n.*it has a host and nowhere a space"),
        ({"output": ""}, r"output\n.*at least 1 character"),
    ],
)
def test_mistake_in_the_settings_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        annotate_settings(tmp_path, **change)


def test_answers_are_those_of_the_bare_engine(corpus: Path, tiny_checkpoint: Path) -> None:
    settings = annotate_settings(corpus)
    manifest = annotate_here(settings)
    assert (manifest.rows, manifest.errors, len(manifest.parts)) == (NUM_ROWS, {}, 3)
    rows = rows_of(settings.output)
    assert [each["key"] for each in rows] == [f"corpus:{number}" for number in range(NUM_ROWS)]
    assert manifest.answer_tokens == sum(each["answer_tokens"] for each in rows) > 0
    with Engine.from_checkpoint(tiny_checkpoint, "cpu") as engine:
        encoder = Encoder(engine.processor)
        for number, each in enumerate(rows):
            image = decode_image(encoded(number)) if number % 4 != 3 else None
            prompt = encoder.prompt(_questions(number), image, Sampling(max_tokens=6))
            [answer] = engine.generate([prompt])
            assert (each["answer"], each["finish_reason"]) == (answer.text, answer.finish_reason)
            assert (each["prompt_tokens"], each["answer_tokens"]) == (len(prompt.input_ids), len(answer.token_ids))
            assert (each["id"], each["source"], each["error"]) == (f"own-{number % 3}", "corpus", None)
            assert each["model"] == manifest.model and len(manifest.model) == 64
    assert verify(settings.output) == []


def test_answers_too_long_for_any_slot_are_refused_before_the_first_row(corpus: Path) -> None:
    settings = annotate_settings(corpus, max_tokens=300, engine={"max_length": 300})
    with pytest.raises(ValueError, match=r"max_tokens is 300, and a slot of the engine holds 300 tokens.*max_length"):
        annotate_here(settings)


def _questions(number: int) -> list[dict[str, str]]:
    turns = row(number)["conversations"][:3]
    roles = {"human": "user", "gpt": "assistant"}
    return [{"role": roles[t["from"]], "content": t["value"].removeprefix("<image>\n")} for t in turns]


def test_bad_rows_have_a_row_with_the_reason(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "images").mkdir()
    bad = bad_rows(tmp_path)
    for fine in ("no_loss_tokens", "empty_answer"):  # their questions can be answered
        del bad[fine]
    write_corpus(tmp_path, [*bad.values(), *(row(number) for number in range(6))])
    (tmp_path / "model").symlink_to(tiny_checkpoint)
    settings = annotate_settings(tmp_path, max_error_share=0.9, sources=[_source(tmp_path)])
    manifest = annotate_here(settings)
    rows = rows_of(settings.output)
    assert [each["key"] for each in rows] == [f"corpus:{number}" for number in range(len(bad) + 6)]
    for reason, each in zip(bad, rows, strict=False):
        assert each["error"].startswith(f"{reason}: ")
        assert (each["answer"], each["finish_reason"], each["answer_tokens"]) == (None, "error", 0)
    assert [each["error"] for each in rows[len(bad) :]] == [None] * 6
    assert sum(manifest.errors.values()) == len(bad)


def _source(folder: Path, **change: Any) -> dict[str, Any]:
    return {"path": str(folder / "corpus.jsonl"), "image_root": str(folder)} | change


def test_drawn_answers_depend_on_the_row_and_the_seed_alone(corpus: Path) -> None:
    drawn = {"temperature": 1.0, "top_p": 0.9, "prompt": "Describe {id}: {question}"}
    answers = []
    for name, change in (("a", {}), ("b", {"chunk_rows": 7}), ("c", {"seed": 1})):
        settings = annotate_settings(corpus, output=str(corpus / name), **drawn, **change)
        annotate_here(settings)
        answers.append([each["answer"] for each in rows_of(settings.output)])
    assert answers[0] == answers[1] != answers[2]
    assert row_seed(0, "a:1") != row_seed(0, "a:2")


@pytest.mark.parametrize(("format", "corpus_format"), [("parquet", "parquet"), ("jsonl", "messages")])
def test_output_is_a_corpus(corpus: Path, format: str, corpus_format: str) -> None:
    """Self-captioning: what the model says about its pictures is prepared as they are."""
    settings = annotate_settings(corpus, format=format, prompt="What <image> is it? {question}")
    annotate_here(settings)
    write_processor(corpus)
    source = {"path": f"{settings.output}/parts/corpus/*.{format}", "format": corpus_format, "name": "said"}
    prepared = prepare_settings(corpus, sources=[source | {"image_root": str(corpus)}], output=str(corpus / "shards"))
    manifest = prepare_here(prepared)
    assert (manifest.planned, manifest.written) == (NUM_ROWS, NUM_ROWS)
    dataset = ShardedDataset(prepared.output)
    processor = FlashSlothProcessor.from_pretrained(corpus / "processor")
    answers = {f"said/{n // 4:08d}.{format}:{n % 4}": n for n in range(NUM_ROWS)}
    texts = _answers(settings, format)
    for index in range(NUM_ROWS):
        sample = dataset.read(index)
        number = answers[sample["key"]]
        assert sample["messages"] == [
            {"role": "user", "content": "What <image> is it? How many?"},
            {"role": "assistant", "content": texts[number]},
        ]
        if number % 4 != 3:
            pixels = processor.image_processor.to_uint8(decode_image(encoded(number)))
            assert (sample["pixel_values"] == pixels).all()


def _answers(settings: AnnotateSettings, format: str) -> list[str]:
    if format == "parquet":
        return [each["answer"] for each in rows_of(settings.output)]
    folder = storage.join(settings.output, "parts", "corpus")
    lines = b"".join(storage.read_bytes(storage.join(folder, name)) for name in storage.list_names(folder))
    return [json.loads(line)["answer"] for line in lines.splitlines()]


def test_folder_of_images_is_captioned_and_prepared(tmp_path: Path, tiny_checkpoint: Path) -> None:
    (tmp_path / "photos" / "deep").mkdir(parents=True)
    for number in range(5):
        (tmp_path / "photos" / "deep" / f"{number}.jpg").write_bytes(encoded(number))
    (tmp_path / "photos" / "broken.png").write_bytes(b"none")
    (tmp_path / "model").symlink_to(tiny_checkpoint)
    photos = {"path": str(tmp_path / "photos"), "format": "images", "image_root": str(tmp_path / "photos")}
    settings = annotate_settings(tmp_path, sources=[photos], prompt="Describe it.", max_error_share=0.5)
    manifest = annotate_here(settings)
    assert (manifest.rows, manifest.errors) == (6, {"image_undecodable": 1})
    write_processor(tmp_path)
    source = {"path": f"{settings.output}/parts/photos/*.parquet", "format": "parquet", "name": "captions"}
    prepared = prepare_settings(
        tmp_path,
        sources=[source | {"image_root": photos["path"]}],
        layout="caption",
        output=str(tmp_path / "shards"),
        max_quarantined_share=0.5,
    )
    shards = prepare_here(prepared)
    assert (shards.planned, shards.written, shards.quarantined) == (6, 5, 1)


@pytest.mark.parametrize("format", ["parquet", "webdataset"])
def test_images_without_any_text_are_captioned_and_prepared(tmp_path: Path, tiny_checkpoint: Path, format: str) -> None:
    path = tmp_path / f"photos.{format}"
    if format == "parquet":
        images = [{"bytes": encoded(number), "path": f"{number}.jpg"} for number in range(5)]
        pq.write_table(pa.table({"image": images, "label": range(5)}), path)
    else:
        with tarfile.open(path, "w") as tar:
            for number in range(5):
                member = tarfile.TarInfo(f"{number}.jpg")
                member.size = len(encoded(number))
                tar.addfile(member, io.BytesIO(encoded(number)))
    source = {"path": str(path), "format": format}
    (tmp_path / "model").symlink_to(tiny_checkpoint)
    settings = annotate_settings(tmp_path, sources=[source], prompt="Describe it.")
    manifest = annotate_here(settings)
    assert (manifest.rows, manifest.errors) == (5, {})
    write_processor(tmp_path)
    captions = {"path": f"{settings.output}/parts/photos/*.parquet", "format": "parquet", "name": "captions"}
    shards = str(tmp_path / "shards")
    assert prepare_here(prepare_settings(tmp_path, sources=[captions], layout="caption", output=shards)).written == 5
    # There is nothing to learn from the images themselves.
    with pytest.raises(PublishError, match=r"conversation_empty 5.*jobs/annotate.py"):
        prepare_here(prepare_settings(tmp_path, sources=[source], output=str(tmp_path / "none")))


def test_answers_may_lie_below_the_images(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """What a run has written is none of the images that it, or one that resumes it, looks at again."""
    for number in range(5):
        (tmp_path / f"{number}.png").write_bytes(encoded(number))
    (tmp_path / "model").symlink_to(tiny_checkpoint)
    source = {"path": str(tmp_path), "format": "images", "image_root": str(tmp_path), "name": "corpus"}
    settings = annotate_settings(tmp_path, sources=[source], prompt="Describe it.")
    ledger = begin(settings)
    assert begin(settings).plan_identity == ledger.plan_identity
    assert annotate_here(settings).errors == {}
    assert [each["id"] for each in rows_of(settings.output)] == [f"{number}.png" for number in range(5)]
    assert begin(settings).plan_identity == ledger.plan_identity


@pytest.mark.s3
def test_prefix_of_images_on_s3(tmp_path: Path, s3_uri: str, tiny_checkpoint: Path) -> None:
    for number in range(5):
        storage.write_bytes(storage.join(s3_uri, "photos", f"{number}.jpg"), encoded(number))
    (tmp_path / "model").symlink_to(tiny_checkpoint)
    photos = storage.join(s3_uri, "photos")
    source = {"path": photos, "format": "images", "image_root": photos, "name": "corpus"}
    settings = annotate_settings(tmp_path, sources=[source], prompt="Why?", output=storage.join(s3_uri, "out"))
    assert annotate_here(settings).errors == {}
    local = annotate_settings(tmp_path, prompt="Why?", output=str(tmp_path / "local"))
    write_corpus(tmp_path, [row(0, id=f"{number}.jpg", image=f"images/{number}.jpg") for number in range(5)])
    annotate_here(local)
    same = ("key", "id", "answer", "finish_reason", "prompt_tokens", "answer_tokens", "error")
    assert [[each[name] for name in same] for each in rows_of(settings.output)] == [
        [each[name] for name in same] for each in rows_of(local.output)
    ]
    assert verify(settings.output) == []


def test_images_that_the_input_holds_are_copied(corpus: Path) -> None:
    first = annotate_settings(corpus, format="jsonl")
    annotate_here(first)
    held = corpus / "held.jsonl"
    rows = []
    for line in (corpus / "out" / "parts" / "corpus" / "00000000.jsonl").read_text().splitlines():
        each = json.loads(line)
        if each["image"]:
            data = base64.b64encode((corpus / each["image"]).read_bytes()).decode()
            each["image"] = f"data:image/jpeg;base64,{data}"
        rows.append(json.dumps(each))
    held.write_text("\n".join(rows))
    source = {"path": str(held), "format": "messages"}
    settings = annotate_settings(corpus, sources=[source], output=str(corpus / "again"))
    annotate_here(settings)
    images = pq.read_table(f"{settings.output}/parts/held/00000000.parquet")["image"].to_pylist()
    assert [image and image["bytes"] for image in images] == [encoded(0), encoded(1), encoded(2), None]
    assert all(image is None or image["path"] is None for image in images)


def test_answers_alone(corpus: Path) -> None:
    settings = annotate_settings(corpus, as_corpus=False)
    annotate_here(settings)
    assert "messages" not in rows_of(settings.output)[0]
    assert verify(settings.output) == []


def test_resume_with_other_terms_is_refused(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(annotate_settings(corpus))
    monkeypatch.setattr(annotate_module, "start_ray", lambda: pytest.fail("it went on"))
    with pytest.raises(PlanError, match=r"other terms: prompt: was None, now 'Why\?'; max_tokens: was 6, now 7\. Run"):
        annotate_module.annotate(annotate_settings(corpus, prompt="Why?", max_tokens=7))


def test_verify_names_what_changed(corpus: Path) -> None:
    with pytest.raises(ManifestError, match="no manifest"):
        verify(str(corpus))
    settings = annotate_settings(corpus)
    entries = annotate_here(settings).parts
    paths = [Path(settings.output, entry.name) for entry in entries]
    data = [path.read_bytes() for path in paths]
    paths[0].unlink()
    paths[1].write_bytes(data[1][:-1])
    paths[2].write_bytes(bytes([data[2][0] ^ 1]) + data[2][1:])
    faults = verify(settings.output)
    assert faults[0] == f"{paths[0]}: expected {len(data[0])} bytes with sha256 {entries[0].sha256}, found no such file"
    assert faults[1] == f"{paths[1]}: expected {len(data[1])} bytes, found {len(data[1]) - 1}"
    assert faults[2].startswith(f"{paths[2]}: expected sha256 {entries[2].sha256}, found ")
