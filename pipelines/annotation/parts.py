"""A part: the rows of one chunk with their answers, as one Parquet or JSON-lines file.

A part is named by its chunk and put if absent, so that of two workers that do one chunk only one is heard, and every
input has one row in `parts/` at any time. Where a part is lost or damaged, its chunk is answered anew under another
name, for the answers may be others than those of which the receipt tells; what is left of it goes behind the manifest.

A part is a corpus as well, of the format `parquet` or `messages`: a row has the conversation that was asked with the
answer behind it, and the image; a row without an answer ends in its question, and preparation quarantines it.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from pipelines import storage
from pipelines.annotation.settings import PartFormat
from pipelines.records import FileFormatError, Message
from pipelines.shards.receipts import attempt_name

PART_FOLDER = "parts"
_ATTEMPT = re.compile(r"-\d+(?=\.[a-z]+$)")
_ROW_GROUP = 128  # rows, with their images
_CONTENT = pa.list_(pa.struct([("type", pa.string()), ("text", pa.string())]))

ANSWER_SCHEMA = pa.schema(
    [
        ("key", pa.string()),  # source and position: unique in an output
        ("id", pa.string()),  # the corpus's own id, may repeat
        ("source", pa.string()),
        ("answer", pa.string()),  # null where there is none
        ("finish_reason", pa.string()),  # stop, length, or error
        ("prompt_tokens", pa.int32()),
        ("answer_tokens", pa.int32()),
        ("model", pa.dictionary(pa.int32(), pa.string())),  # hash of the checkpoint, or what the endpoint says of it
        ("error", pa.string()),  # null, or the reason: what exactly
    ]
)
CORPUS_SCHEMA = pa.schema(
    [
        *ANSWER_SCHEMA,
        ("messages", pa.list_(pa.struct([("role", pa.string()), ("content", _CONTENT)]))),
        ("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
    ]
)


@dataclass(frozen=True)
class Answered:
    """What became of one question.

    Attributes:
        answer: the text, or None where there is none.
        finish_reason: stop, length or error.
        prompt_tokens: 0 where the question never came so far.
        answer_tokens: of the answer.
        error: None, or `reason: detail`.
    """

    answer: str | None
    finish_reason: str
    prompt_tokens: int
    answer_tokens: int
    error: str | None = None

    @classmethod
    def failed(cls, error: str, prompt_tokens: int = 0) -> Answered:
        """No answer."""
        return cls(None, "error", prompt_tokens, 0, error)


@dataclass(frozen=True)
class PartRow:
    """One input with its answer.

    Attributes:
        key: names the input.
        id: the corpus's own.
        source: the corpus's name.
        messages: what was asked; empty where the row was not fit to be asked.
        image: path below the image root, or the bytes, or None.
        answered: what came of it.
    """

    key: str
    id: str
    source: str
    messages: list[Message]
    image: str | bytes | None
    answered: Answered


class PartEntry(BaseModel):
    """A part as the manifest lists it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """Path below the output."""
    rows: int
    bytes: int
    sha256: str
    prompt_tokens: int
    answer_tokens: int
    errors: dict[str, int]
    """Reason -> rows without an answer."""
    example: str | None
    """Key and error of one of them."""


def part_name(source: str, chunk: int, format: PartFormat, attempt: int = 0) -> str:
    """Path of a part below the output: a source's parts lie together, for its images lie below one root."""
    return f"{PART_FOLDER}/{source}/{attempt_name(chunk, attempt)}.{format}"


def first_name(part: str) -> str:
    """The name that the chunk of a part gives to its first attempt."""
    return _ATTEMPT.sub("", part)


def serialize(rows: Sequence[PartRow], model: str, format: PartFormat, as_corpus: bool) -> bytes:
    """The bytes of a part, the same for the same rows."""
    if format == "jsonl":
        return b"".join(
            json.dumps(_json_row(row, model, as_corpus), ensure_ascii=False).encode() + b"\n" for row in rows
        )
    schema = CORPUS_SCHEMA if as_corpus else ANSWER_SCHEMA
    table = pa.Table.from_pylist([_arrow_row(row, model, as_corpus) for row in rows], schema=schema)
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=_ROW_GROUP)
    return sink.getvalue()


def describe(name: str, data: bytes) -> tuple[PartEntry, list[str]]:
    """What the manifest says of the part `name` with the bytes `data`, and the keys of its rows, in order.

    Raises:
        FileFormatError: it is no part.
    """
    columns = ["key", "prompt_tokens", "answer_tokens", "error"]
    try:
        rows = list(_read(name, data, columns))
        entry = PartEntry(
            name=name,
            rows=len(rows),
            bytes=len(data),
            sha256=storage.sha256(data),
            prompt_tokens=sum(row["prompt_tokens"] for row in rows),
            answer_tokens=sum(row["answer_tokens"] for row in rows),
            errors=dict(sorted(Counter(row["error"].partition(":")[0] for row in rows if row["error"]).items())),
            example=next((f"{row['key']}: {row['error']}" for row in rows if row["error"]), None),
        )
    except (pa.ArrowException, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(f"{name}: not a part of an annotation: {error}") from error
    return entry, [row["key"] for row in rows]


def _read(name: str, data: bytes, columns: list[str]) -> Iterator[dict[str, Any]]:
    if name.endswith(".jsonl"):
        for line in data.splitlines():
            row = json.loads(line)
            yield {column: row[column] for column in columns}
        return
    yield from pq.read_table(io.BytesIO(data), columns=columns).to_pylist()


def _answer_columns(row: PartRow, model: str) -> dict[str, Any]:
    return {"key": row.key, "id": row.id, "source": row.source, "model": model, **asdict(row.answered)}


def _turns(row: PartRow, image_part: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation with typed content: what a text spells can then not be taken for the mark of an image."""
    turns: list[dict[str, Any]] = []
    for message in row.messages:
        turns.append({"role": message["role"], "content": [{"type": "text", "text": message["content"]}]})
    if row.answered.answer is not None:
        turns.append({"role": "assistant", "content": [{"type": "text", "text": row.answered.answer}]})
    first = next((turn for turn in turns if turn["role"] == "user"), None)
    if row.image is not None and first is not None:
        first["content"].insert(0, image_part)
    return turns


def _arrow_row(row: PartRow, model: str, as_corpus: bool) -> dict[str, Any]:
    columns = _answer_columns(row, model)
    if as_corpus:
        columns["messages"] = _turns(row, {"type": "image", "text": None})
        held = isinstance(row.image, bytes)
        image = {"bytes": row.image if held else None, "path": None if held else row.image}
        columns["image"] = image if row.image is not None else None
    return columns


def _json_row(row: PartRow, model: str, as_corpus: bool) -> dict[str, Any]:
    columns = _answer_columns(row, model)
    if as_corpus:
        image = row.image
        if isinstance(image, bytes):
            image = f"data:application/octet-stream;base64,{base64.b64encode(image).decode()}"
        columns["messages"] = _turns(row, {"type": "image"})
        columns["image"] = image
    return columns
