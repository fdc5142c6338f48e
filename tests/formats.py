"""Reading a corpus through its format, as a preparation does: found first, then read span by span."""

from __future__ import annotations

from pathlib import Path

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
