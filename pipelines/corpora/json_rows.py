"""Rows of a JSON array or of a JSON-lines file, found without parsing them and without holding the file.

A scan yields where each row lies. It keeps one block of bytes (more where a single row is longer), so a file of any
size is planned in constant memory. It looks at strings, brackets and commas alone, so a broken row does not stop it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

from pipelines import storage
from pipelines.corpora.array_scanner import BLANKS, BOM, ArrayScanner
from pipelines.corpora.spans import Extent, Span
from pipelines.records import FileFormatError, Record, Row, RowError

_BLOCK = 4 * 2**20
_COMPRESSED = {
    **{b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz"},
    **{b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip"},
}
_WIDE_BOMS = (b"\xff\xfe", b"\xfe\xff", b"\0\0\xfe\xff")  # of UTF-16 and UTF-32


def is_json_lines(path: str) -> bool:
    """Whether `path` is named as JSON lines; every other name is taken for one JSON array."""
    return path.lower().endswith((".jsonl", ".ndjson", ".jsonlines"))


def scan(path: str) -> Iterator[Extent]:
    """Where each row of `path` lies, in order.

    Raises:
        FileNotFoundError: no such file.
        FileFormatError: a JSON file is no array, or the array is not closed; the file is compressed, is not in UTF-8 by
            its byte order mark, or holds an array and is named as JSON lines.
    """
    return scan_lines(path) if is_json_lines(path) else scan_array(path)


def scan_lines(path: str) -> Iterator[Extent]:
    """Extents of the lines of `path` that are not blank."""
    start, line, held, num_rows, first = 0, 1, b"", 0, b""
    for block in _blocks(path):
        held += block
        if not num_rows and len(held) >= _BLOCK:
            _check_no_array(path, held)  # a line as long as that is not waited for: it may be all there is
        *lines, held = held.split(b"\n")
        for text in lines:
            if text.strip(BLANKS):
                if not num_rows:
                    first = text.strip(BLANKS)
                    _check_first_line(path, first)
                num_rows += 1
                yield Extent(start, start + len(text), line, len(text))
            start, line = start + len(text) + 1, line + 1
    if held.strip(BLANKS):
        yield Extent(start, start + len(held), line, len(held))
    if num_rows == 0 or (num_rows == 1 and not held.strip(BLANKS)):  # what stands alone
        _check_no_array(path, held if num_rows == 0 else first)


def scan_array(path: str) -> Iterator[Extent]:
    """Extents of the elements of the JSON array in `path`."""
    scanner = ArrayScanner(path)
    for block in _blocks(path):
        yield from scanner.feed(block)
    yield from scanner.close()


def read_rows(path: str, span: Span) -> Iterator[tuple[str, Any]]:
    """(location, parsed JSON value or RowError) of each row of `span`, in order."""
    data = storage.read_range(path, span.start, span.stop)
    rows = _lines_of(data, span) if is_json_lines(path) else _elements_of(data, span, path)
    for location, text in rows:
        yield f"{path}:{location}", parse(text)


def read(path: str, span: Span, record: Callable[[Any], Record]) -> Iterator[Row]:
    """The rows of `span`, in order, each with what `record` makes of it or with the RowError that it raises."""
    for position, (location, value) in enumerate(read_rows(path, span), start=span.first_row):
        content: Record | RowError
        try:
            content = value if isinstance(value, RowError) else record(value)
        except RowError as error:
            content = error
        yield Row(position, location, content)


def parse(text: bytes) -> Any:
    """The JSON value that `text` spells, or why it spells none."""
    try:
        return json.loads(text.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        return RowError("row_malformed", f"not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}")
    except RowError as error:
        return error
    except (ValueError, RecursionError) as error:
        return RowError("row_malformed", f"not valid JSON: {error}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """As `dict`, which would take the last of several values in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        other = next((name for name, value in pairs if value != found[name]), None)
        if other is not None:
            raise RowError("row_malformed", f"{other!r} stands twice in an object, with different values")
    return found


def _check_first_line(path: str, text: bytes) -> None:
    # A row that is a list is a bad row. A line that is a part of one belongs to an array.
    if text == b"[" or (text[:1] == b"[" and text[-1:] == b","):
        raise _is_an_array(path, text)


def _check_no_array(path: str, text: bytes) -> None:
    """Of the only line of a file, or its beginning: a list of objects is an array of rows, as `json.dump` writes it."""
    text = text[: 2**16].removeprefix(BOM).strip(BLANKS)
    if text[:1] == b"[" and text[1:].lstrip(BLANKS)[:1] == b"{":
        raise _is_an_array(path, text)


def _is_an_array(path: str, text: bytes) -> FileFormatError:
    return FileFormatError(
        f"{path}: begins with {text[:9]!r}: a {path[path.rindex('.') :]} corpus has a row on each line; name "
        "a file with one array of rows .json"
    )


def _check_encoding(path: str, head: bytes) -> None:
    packer = next((name for signature, name in _COMPRESSED.items() if head.startswith(signature)), None)
    if packer:
        raise FileFormatError(f"{path}: is compressed ({packer}), so no worker can begin in its middle; unpack it")
    if head.startswith(b"version https://git-lfs"):
        raise FileFormatError(f"{path}: is a pointer of Git LFS, not the corpus: git lfs pull fetches it")
    if head.startswith(_WIDE_BOMS):
        raise FileFormatError(f"{path}: is UTF-16 or UTF-32, by its first bytes; write it as UTF-8 (by iconv -t UTF-8)")


def _lines_of(data: bytes, span: Span) -> Iterator[tuple[str, bytes]]:
    for line, text in enumerate(data.split(b"\n"), start=span.first_line):
        if text.strip(BLANKS):
            yield str(line), text


def _elements_of(data: bytes, span: Span, path: str) -> Iterator[tuple[str, bytes]]:
    scanner = ArrayScanner(path, span)
    extents = chain(scanner.feed(data), scanner.rest())
    for row, extent in enumerate(extents, start=span.first_row):
        yield f"{extent.line} (element {row})", data[extent.start : extent.stop]


def _blocks(path: str) -> Iterator[bytes]:
    with storage.open_file(path, _BLOCK) as file:
        _check_encoding(path, block := file.read(_BLOCK))
        while block:
            yield block
            block = file.read(_BLOCK)
