"""Corpora of every format: writing the same rows in each, and reading as a preparation does, span by span."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.corpora import FORMATS
from pipelines.corpora.spans import group
from pipelines.records import Record, Row, RowError


def read_rows(name: str, path: Path | str, rows: int = 2) -> list[Row]:
    """All rows of the file, in spans of `rows`."""
    form = FORMATS[name]
    spans = list(group(form.scan(str(path)), rows))
    found = [row for span in spans for row in form.read(str(path), span)]
    assert [row.position for row in found] == list(range(len(found)))
    assert sum(span.rows for span in spans) == len(found)
    return found


def records(rows: list[Row]) -> list[Record]:
    """What `rows` hold, all of which must be good."""
    bad = [row.content for row in rows if not isinstance(row.content, Record)]
    assert not bad, bad
    return [row.content for row in rows if isinstance(row.content, Record)]


def error(row: Row) -> RowError:
    """Why `row` is no record."""
    assert isinstance(row.content, RowError), row.content
    return row.content


def write_as(name: str, folder: Path, rows: list[dict[str, Any]]) -> dict[str, str]:
    """Write LLaVA rows, whose images lie below `folder`, in the format `name`; returns the source of a recipe."""
    path = folder / name / f"{name}.{_SUFFIXES[name]}"
    path.parent.mkdir(exist_ok=True)
    if name == "parquet":
        table = pa.Table.from_pylist([_with_struct(folder, row) for row in rows])
        pq.write_table(table, path, row_group_size=3)
    elif name == "webdataset":
        _write_tar(path, folder, rows)
    else:
        written = [_as_messages(row) for row in rows] if name == "messages" else rows
        path.write_text(json.dumps(written) if path.suffix == ".json" else "\n".join(map(json.dumps, written)))
    return {"path": str(path), "format": name.partition("-")[0], "image_root": str(folder)}


_SUFFIXES = {
    "llava": "jsonl",
    "llava-array": "json",
    "sharegpt": "json",
    "messages": "jsonl",
    "parquet": "parquet",
    "webdataset": "tar",
}


def _as_messages(row: dict[str, Any]) -> dict[str, Any]:
    roles = {"human": "user", "gpt": "assistant"}
    messages: list[dict[str, Any]] = []
    for turn in row["conversations"]:
        text = turn["value"].removeprefix("<image>\n")
        parts: list[dict[str, Any]] = [{"type": "text", "text": text}]
        if text != turn["value"]:
            parts.insert(0, {"type": "image", "image": row["image"]})
        messages.append({"role": roles[turn["from"]], "content": parts})
    return {"id": row["id"], "messages": messages}


def _with_struct(folder: Path, row: dict[str, Any]) -> dict[str, Any]:
    image = {"bytes": (folder / row["image"]).read_bytes(), "path": row["image"]} if "image" in row else None
    return row | {"image": image}


def _write_tar(path: Path, folder: Path, rows: list[dict[str, Any]]) -> None:
    with tarfile.open(path, "w") as tar:
        for number, row in enumerate(rows):
            files = {f"{number:06}.json": json.dumps(row).encode()}
            if "image" in row:
                files[f"{number:06}.jpg"] = (folder / row["image"]).read_bytes()
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
