"""Corpora that are larger than memory should be: they are found, planned and read without being held."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

import pytest

from pipelines.corpora import llava
from pipelines.corpora.spans import Span, group
from pipelines.preparation.plan import Plan, check_rows, index_files
from pipelines.preparation.settings import SourceSettings
from pipelines.preparation.sources import source_terms
from tests.memory import peak_growth
from tests.preparation import plan_terms

MB = 10**6


def write_llava(path: Path, rows: int, row_bytes: int) -> Path:
    """A LLaVA array of made-up rows of about this many bytes, as json.dump writes them; ids repeat."""
    text = 'The picture shows a street with three buses, of which the first is \\"red\\" [sic]. '
    answer = (text * (row_bytes // len(text) + 1))[: row_bytes - 240].rstrip("\\")
    question = '{"from": "human", "value": "<image>\\nDescribe the picture, please."}'
    with path.open("w") as file:
        for number in range(rows):
            head = f'{"," if number else "["} {{"id": "{number % 1000:012d}", "image": "coco/{number:012d}.jpg", '
            file.write(head + f'"conversations": [{question}, {{"from": "gpt", "value": "{answer}"}}]}}')
        file.write("]")
    return path


def find(path: Path) -> list[Span]:
    return list(group(llava.scan(str(path)), 500))


def read(path: Path, spans: list[Span]) -> int:
    """Rows of all `spans`, read one span after the other, as a worker does."""
    return sum(len(deque(llava.read(str(path), span), maxlen=500)) for span in spans)


def test_a_json_array_is_found_and_read_without_holding_it(tmp_path: Path) -> None:
    path = write_llava(tmp_path / "corpus.json", 25_000, 3000)
    assert path.stat().st_size > 70 * MB
    spans: list[Span] = []
    assert peak_growth(lambda: spans.extend(find(path))) < 30 * MB
    assert sum(span.rows for span in spans) == 25_000
    assert peak_growth(lambda: read(path, spans[::5])) < 30 * MB
    # What holds the file goes over the bound, so the bound can fail.
    assert peak_growth(lambda: json.loads(path.read_bytes())) > 70 * MB


@pytest.mark.slow
def test_665k_rows_in_a_gigabyte(tmp_path: Path) -> None:
    path = write_llava(tmp_path / "llava_v1_5_mix665k.json", 665_298, 1500)
    assert path.stat().st_size > 950 * MB
    spans: list[Span] = []
    growth = peak_growth(lambda: spans.extend(find(path)))
    print(f"\n{path.stat().st_size / MB:,.0f} MB: {growth / MB:,.0f} MB to find the rows")
    assert growth < 50 * MB
    assert sum(span.rows for span in spans) == 665_298
    assert read(path, spans[-2:]) == spans[-2].rows + spans[-1].rows


@pytest.mark.slow
def test_the_plan_of_ten_million_rows(tmp_path: Path) -> None:
    """With 62 rows to a chunk, as for features of fp16: the smallest chunks that a recipe makes by itself."""
    path = tmp_path / "corpus.jsonl"
    line = '{"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}\n'
    with path.open("w") as file:
        for _ in range(1000):
            file.write(line * 10_000)
    plans: list[Plan] = []

    def make() -> None:
        sources = source_terms([SourceSettings(path=str(path))])
        chunks = index_files(range(1), sources, [str(path)], 62)
        check_rows(sources, chunks)
        plans.append(Plan(terms=plan_terms(sources, 62), chunks=chunks))
        plans[0].identity()
        plans[0].describe("made up")

    growth = peak_growth(make)
    print(f"\n10 million rows in {len(plans[0].chunks):,} chunks: {growth / MB:,.0f} MB")
    assert plans[0].num_rows == 10_000_000
    assert growth < 4000 * MB
