"""Rows of a file -> spans: by their number, by the bytes that whoever reads them holds, and past rows not taken."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.corpora import FORMATS
from pipelines.corpora.spans import Extent, Span, group
from tests.formats import read_rows, records, write_as

MEGABYTE = 10**6


def extents(*sizes: int) -> list[Extent]:
    """Rows of 10 bytes, which bring images: together `sizes`."""
    return [Extent(10 * row, 10 * row + 5, row + 1, size) for row, size in enumerate(sizes)]


def test_group_cuts_and_passes_over() -> None:
    rows = extents(5, 5, 5, 5, 5)
    assert list(group(rows, rows=2)) == [Span(0, 15, 0, 2, 1, 10), Span(20, 35, 2, 2, 3, 10), Span(40, 45, 4, 1, 5, 5)]
    odd = [Span(10, 35, 1, 2, 2, 15)]  # rows 1 and 3; row 2 lies between them, row 4 outside
    assert list(group(rows, rows=2, takes=lambda row: row % 2 == 1)) == odd
    assert list(group([], rows=2)) == []


@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        ((50, 50, 50, 50, 50), [4, 1]),
        ((50, 50, 101, 99, 1, 1), [2, 2, 2]),
        ((900, 10, 900, 900), [1, 1, 1, 1]),  # a row is never cut
        ((0, 0, 0, 0), [4]),
    ],
)
def test_a_span_ends_before_it_has_too_many_bytes(sizes: tuple[int, ...], rows: list[int]) -> None:
    spans = list(group(extents(*(size * MEGABYTE for size in sizes)), rows=100))
    assert [span.rows for span in spans] == rows
    starts = [sum(rows[:n]) for n in range(len(rows))]
    assert [span.first_row for span in spans] == starts
    held = [sum(sizes[start : start + count]) * MEGABYTE for start, count in zip(starts, rows, strict=True)]
    assert [span.size for span in spans] == held


def test_rows_that_are_passed_over_count_only_inside_a_span() -> None:
    rows = extents(*(size * MEGABYTE for size in (900, 60, 60, 60, 900, 60, 60)))
    spans = list(group(rows, rows=100, takes=lambda row: row in (1, 3, 5, 6)))
    assert [(span.first_row, span.rows, span.size // MEGABYTE) for span in spans] == [(1, 2, 180), (5, 2, 120)]


def as_messages(folder: Path, rows: list[dict[str, object]]) -> str:
    """A corpus whose rows hold their images as data URIs; returns its path."""
    path = folder / "data-uris.jsonl"
    lines = []
    for row in rows:
        data = base64.b64encode((folder / str(row["image"])).read_bytes()).decode()
        picture = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
        content = [picture, {"type": "text", "text": "Q"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A"}]
        lines.append(json.dumps({"id": row["id"], "messages": messages}))
    path.write_text("\n".join(lines))
    return str(path)


WRITERS: dict[str, Callable[[Path, list[dict[str, object]]], str]] = {
    "parquet": lambda folder, rows: write_as("parquet", folder, rows)["path"],
    "webdataset": lambda folder, rows: write_as("webdataset", folder, rows)["path"],
    "messages": as_messages,
}


@pytest.mark.parametrize("format", WRITERS)
def test_rows_that_bring_large_images_are_cut_by_their_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    noise = np.random.default_rng(0)
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    rows: list[dict[str, object]] = []
    for number in range(12):
        Image.fromarray(noise.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / f"{number}.png")  # 12 kB
        rows.append({"id": f"r{number}", "image": f"{number}.png", "conversations": turns})
    images = [(tmp_path / f"{number}.png").read_bytes() for number in range(12)]
    path = WRITERS[format](tmp_path, rows)
    most = 6 * len(images[0])
    monkeypatch.setattr("pipelines.corpora.spans.MOST_BYTES", most)
    spans = list(group(FORMATS[format].scan(path), 100))
    # Base64 takes 4 bytes for 3, a tar's members have headers.
    assert {span.rows for span in spans[:-1]} <= {3, 4, 5}
    for span in spans:
        assert span.rows * len(images[0]) * 0.9 <= span.size <= most
    found = records(read_rows(format, Path(path), rows=100))
    assert [record.id for record in found] == [row["id"] for row in rows]
    assert [record.image for record in found] == images


def test_columns_of_parquet_that_are_not_read_do_not_count(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    embedding = pa.array([np.random.default_rng(0).bytes(MEGABYTE)] * 10, pa.binary())
    table = pa.table({"conversations": [turns] * 10, "embedding": embedding})
    pq.write_table(table, tmp_path / "a.parquet", use_dictionary=False)
    [span] = group(FORMATS["parquet"].scan(str(tmp_path / "a.parquet")), 10)
    assert 0 < span.size < 10_000
