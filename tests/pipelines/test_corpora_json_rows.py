"""The scanner of JSON arrays and JSON lines, against json.loads of the whole file."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from pipelines.corpora import json_rows
from pipelines.corpora.spans import group
from pipelines.records import FileFormatError, RowError

TEXT = st.text(alphabet='ab"\\{}[],:é\n 😀', max_size=12)
VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


def read_all(path: str, rows: int) -> list[Any]:
    spans = list(group(json_rows.scan(path), rows))
    read = [[value for _, value in json_rows.read_rows(path, span)] for span in spans]
    assert [len(values) for values in read] == [span.rows for span in spans]
    return [value for values in read for value in values]


@given(
    rows=st.lists(VALUE, max_size=6),
    indent=st.sampled_from([None, 1]),
    ascii_only=st.booleans(),
    block=st.integers(1, 40),
    chunk=st.integers(1, 4),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_array_reads_like_json(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    rows: list[Any],
    indent: int | None,
    ascii_only: bool,
    block: int,
    chunk: int,
) -> None:
    monkeypatch.setattr(json_rows, "_BLOCK", block)
    path = tmp_path / "corpus.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=ascii_only), encoding="utf-8")
    assert read_all(str(path), chunk) == rows


@given(rows=st.lists(VALUE, max_size=6), block=st.integers(1, 40), chunk=st.integers(1, 4), end=st.booleans())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_lines_read_like_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: list[Any], block: int, chunk: int, end: bool
) -> None:
    assume(not (rows and isinstance(rows[0], list) and rows[0] and isinstance(rows[0][0], dict)))  # an array of rows
    monkeypatch.setattr(json_rows, "_BLOCK", block)
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)) + "\n" * end)
    assert read_all(str(path), chunk) == rows


def test_broken_rows_carry_file_and_line_and_harm_no_neighbour(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    lines = [
        b'{"id": 1}',
        b"",
        b'{"id": ',
        b'\xef\xbb\xbf{"id": 3}',
        b'{"id": "\xff"}',
        b'{"id": "\x00"}',
        b'{"id": 6}',
    ]
    path.write_bytes(b"\n".join(lines))
    [first, second] = group(json_rows.scan(str(path)), rows=4)
    read = [*json_rows.read_rows(str(path), first), *json_rows.read_rows(str(path), second)]
    assert [location for location, _ in read] == [f"{path}:{line}" for line in (1, 3, 4, 5, 6, 7)]
    values = [value for _, value in read]
    assert (values[0], values[-1]) == ({"id": 1}, {"id": 6})
    errors = values[1:-1]
    assert all(isinstance(error, RowError) and error.reason == "row_malformed" for error in errors)
    assert "BOM" in errors[1].detail
    assert "0xff" in errors[2].detail


def test_a_name_with_two_values_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"image": "a.jpg", "image": "b.jpg"}\n{"a": [{"b": 1, "b": "1"}]}\n{"id": 1, "id": 1}\n')
    first, second, third = read_all(str(path), 2)
    assert (first.reason, first.detail) == (
        "row_malformed",
        "'image' stands twice in an object, with different values",
    )
    assert second.detail == "'b' stands twice in an object, with different values"
    assert third == {"id": 1}


def test_broken_element_of_an_array(tmp_path: Path) -> None:
    path = tmp_path / "corpus.json"
    path.write_text('\ufeff[\n {"id": 1},\n {"id": },\n nonsense,\n {"id": 4}\n]\n', encoding="utf-8")
    [span] = group(json_rows.scan(str(path)), rows=10)
    read = list(json_rows.read_rows(str(path), span))
    assert [location for location, _ in read] == [f"{path}:{line} (element {line - 2})" for line in (2, 3, 4, 5)]
    assert [isinstance(value, RowError) for _, value in read] == [False, True, True, False]


def llava_row(number: int) -> dict[str, Any]:
    turns = [("human", f"<image>\nQ, {number}?"), ("gpt", f'"{number}" [it] is, {{so}}')]
    conversations = [{"from": speaker, "value": text} for speaker, text in turns]
    return {"id": f"own-{number}", "image": f"{number}.jpg", "conversations": conversations}


@pytest.mark.parametrize("seed", range(100))
def test_rows_whose_quotes_or_brackets_are_broken_harm_no_neighbour(tmp_path: Path, seed: int) -> None:
    """A quote or bracket too many or too few in one to three rows, wherever chunks are cut."""
    source = Random(seed)
    rows = [llava_row(number) for number in range(20)]
    texts = [json.dumps(row, indent=source.choice([None, 1])) for row in rows]
    broken = source.sample(range(20), source.randint(1, 3))
    for number in broken:
        text, place = texts[number], source.choice([i for i, sign in enumerate(texts[number]) if sign in '"{}[]'])
        texts[number] = text[:place] + source.choice(["", text[place] * 2]) + text[place + 1 :]
    path = tmp_path / "corpus.json"
    path.write_text("[" + ",\n".join(texts) + "]")
    try:
        values = read_all(str(path), source.choice([1, 3, 50]))
    except FileFormatError as error:  # a bracket that seems to end the array; or no way to tell the last row's end
        assert re.search(r":\d+: the array ends here|row that begins on line \d+", str(error))
        return
    good = [row for number, row in enumerate(rows) if number not in broken]
    assert [value for value in values if value in good] == good
    assert len(values) - len(good) <= 2 * len(broken)
    assert all(isinstance(value, RowError | dict) for value in values)


@pytest.mark.parametrize(
    "broken",
    [
        '{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>',
        '{"image": "a.jpg", "conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}}',
    ],
)
@pytest.mark.parametrize("chunk", [1, 3, 4, 20])
def test_a_broken_row_without_the_first_key_ends_where_the_next_one_opens(
    tmp_path: Path, broken: str, chunk: int
) -> None:
    texts = [json.dumps(llava_row(number)) for number in range(12)]
    texts[2] = broken
    path = tmp_path / "corpus.json"
    path.write_text("[\n" + ",\n".join(texts) + "\n]")
    values = read_all(str(path), chunk)
    assert isinstance(values.pop(2), RowError)
    assert values == [llava_row(number) for number in range(12) if number != 2]


def mutated(source: Random) -> bytes:
    """A small array of rows, of which up to four places are damaged."""
    answers = ["x", '{"id": "5"}', "[1,2]", 'a"b', "\\", "],", '}, {"id":', "é\n"]
    rows = [
        {"id": f"{number}", "conversations": [{"from": "human", "value": "Q"}, {"value": source.choice(answers)}]}
        for number in range(source.randint(1, 9))
    ]
    if source.random() < 0.3:
        rows = [dict(reversed(row.items())) for row in rows]
    elif source.random() < 0.3:
        rows = [{"id": row["id"], "inner": [{"id": "x"}, {"id": "y"}], **row} for row in rows]
    data = bytearray(json.dumps(rows, indent=source.choice([None, 1]), ensure_ascii=source.random() < 0.5).encode())
    for _ in range(source.randint(1, 4)):
        place = source.randrange(len(data) + 1)
        stop = place + source.choice([0, 1, source.randint(1, 40)])
        again = bytes(data[max(place - source.randint(1, 80), 0) : place])
        signs = [bytes([sign]) for sign in b'"{}[],\\: \0\xff']
        data[place:stop] = source.choice([b"", again, source.choice(signs), source.choice(signs)])
    return bytes(data)


def test_damaged_arrays_hold_the_same_rows_whichever_spans_they_are_read_in(tmp_path: Path) -> None:
    source = Random(0)
    path = tmp_path / "corpus.json"
    for _ in range(300):
        path.write_bytes(data := mutated(source))
        try:
            extents = list(json_rows.scan(str(path)))
        except FileFormatError:
            continue
        scanned = [json_rows.parse(data[extent.start : extent.stop]) for extent in extents]
        lines = [f"{path}:{extent.line} (element {row})" for row, extent in enumerate(extents)]
        for rows in (1, 2, 3, 5):
            read = [each for span in group(extents, rows) for each in json_rows.read_rows(str(path), span)]
            assert [location for location, _ in read] == lines, (rows, data)
            assert [repr(value) for _, value in read] == [repr(value) for value in scanned], (rows, data)


def test_a_comma_is_missing_between_two_rows(tmp_path: Path) -> None:
    path = tmp_path / "corpus.json"
    path.write_text('[{"id": 1},\n{"id": 2}\n{"id": 3},\n{"id": 4, "list": [{"id": 5}, {"id": 6}]}]')
    assert read_all(str(path), 10) == [{"id": 1}, {"id": 2}, {"id": 3}, {"id": 4, "list": [{"id": 5}, {"id": 6}]}]


@pytest.mark.parametrize("chunk", [1, 2, 10])
def test_a_comma_is_missing_after_a_row_that_holds_objects_like_rows(tmp_path: Path, chunk: int) -> None:
    rows = [{"id": number, "text": "é", "list": [{"id": 5}, {"id": 6}]} for number in range(4)]
    path = tmp_path / "corpus.json"
    texts = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text(f"[{texts[0]}\n{texts[1]},\n{texts[2]},\n{texts[3]}]", encoding="utf-8")
    assert read_all(str(path), chunk) == rows


def test_a_bracket_too_many_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "corpus.json"
    path.write_text('[{"id": 1}}\n, {"id": 2}]')
    first, second = read_all(str(path), 1)
    assert isinstance(first, RowError) and second == {"id": 2}


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 10])
def test_an_empty_element_is_a_bad_row_wherever_a_span_ends(tmp_path: Path, chunk: int) -> None:
    path = tmp_path / "corpus.json"
    path.write_text("[, 1, 2,\n , 4,, 6, , ]")
    values = read_all(str(path), chunk)
    assert [None if isinstance(value, RowError) else value for value in values] == [None, 1, 2, None, 4, None, 6, None]


def test_very_deep_row_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text("[" * 200_000 + "]" * 200_000 + '\n{"id": 1}\n')
    values = read_all(str(path), 2)
    assert isinstance(values[0], RowError)
    assert values[1] == {"id": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"id": 1}, {"id": 2}', "not closed"),
        ('[{"id": "1]', "not closed"),
        ('[{"id": 1}]]', ":1: the array ends here, but the file goes on"),
        ('[{"id": 1}]\n[{"id": 2}]', ":1: the array ends here, but the file goes on"),
        ('{"id": 1}', r"begins with .*one array of rows.*\.jsonl"),
        ("PAR1", r"a Parquet file: say so of its source, format: parquet"),
        ("", "the file is empty"),
    ],
)
def test_file_that_is_no_array_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "corpus.json"
    path.write_text(content)
    with pytest.raises(FileFormatError, match=message) as raised:
        list(json_rows.scan(str(path)))
    assert str(path) in str(raised.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl.gz", gzip.compress(b'{"id": 1}\n', mtime=0), r"is compressed \(gzip\).* unpack it"),
        ("a.json", gzip.compress(b'[{"id": 1}]', mtime=0), r"is compressed \(gzip\).* unpack it"),
        ("a.jsonl", bz2.compress(b'{"id": 1}\n'), r"is compressed \(bzip2\)"),
        ("a.jsonl.xz", lzma.compress(b'{"id": 1}\n'), r"is compressed \(xz\)"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd...", r"is compressed \(zstd\)"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n", "pointer of Git LFS.*pull"),
        ("a.jsonl", '{"id": 1}\n'.encode("utf-16"), "is UTF-16 or UTF-32.*as UTF-8"),
        ("a.json", '[{"id": 1}]'.encode("utf-16"), "is UTF-16 or UTF-32"),
        ("a.jsonl", b"\n[\n" + b' {"id": 1},\n {"id": 2}\n]\n', r"one array of rows \.json"),
        ("a.ndjson", b'[{"id": 1},\r\n {"id": 2}]', r"a \.ndjson corpus has a row on each line"),
        ("a.jsonl", b'[{"id": 1}, {"id": 2}]', r"begins with .*one array of rows \.json"),
        ("a.jsonl", b'\xef\xbb\xbf [ {"id": 1}]\n\n', r"one array of rows \.json"),
    ],
)
def test_file_of_another_kind_is_told_by_how_it_begins(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=f"{name}: .*{message}"):
        list(json_rows.scan(str(path)))


def test_an_array_on_one_line_is_not_read_to_its_end_to_be_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_rows, "_BLOCK", 100)
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps([{"id": number} for number in range(1000)]))
    blocks = json_rows._blocks(str(path))
    read: list[bytes] = []
    monkeypatch.setattr(json_rows, "_blocks", lambda path: (read.append(block) or block for block in blocks))
    with pytest.raises(FileFormatError, match=r"one array of rows \.json"):
        list(json_rows.scan(str(path)))
    assert len(read) == 1


@pytest.mark.parametrize("name", ["A.JSONL", "a.Jsonl", "a.NDJSON"])
def test_json_lines_may_be_named_in_capitals(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"id": 1}\n\n[{"id": 2}]\n["cut",\n')
    rows = read_all(str(tmp_path / name), 2)
    assert rows[:2] == [{"id": 1}, [{"id": 2}]]
    assert isinstance(rows[2], RowError)
