"""Rows of a JSON array or of a JSON-lines file, found without parsing them and without holding the file.

A scan yields where each row lies. It keeps one block of bytes (more where a single string is longer), so a file of any
size is planned in constant memory. A broken row does not stop it: it looks at strings, brackets and commas alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from pipelines import storage
from pipelines.corpora.spans import Extent, Span
from pipelines.records import FileFormatError, Record, Row, RowError

_BLOCK = 4 * 2**20
_BOM = b"\xef\xbb\xbf"
_BLANKS = b" \t\r\n"
# A string, an object without brackets in it (a turn of a conversation: most of the file in one match), or a bracket or
# comma. A string that does not end in this block leaves group 1 empty. Possessive quantifiers: nothing is read twice.
_STRING = rb'"(?:[^"\\]++|\\.)*+'
_TOKEN = re.compile(_STRING + rb'("?)|\{(?:[^"{}\[\]]++|' + _STRING + rb'")*+\}|[\[\]{},]', re.DOTALL)


def is_json_lines(path: str) -> bool:
    """Whether `path` is named as JSON lines; every other name is taken for one JSON array."""
    return path.endswith((".jsonl", ".ndjson", ".jsonlines"))


def scan(path: str) -> Iterator[Extent]:
    """Where each row of `path` lies, in order.

    Raises:
        FileNotFoundError: no such file.
        FileFormatError: a JSON file is no array, or the array is not closed.
    """
    return scan_lines(path) if is_json_lines(path) else scan_array(path)


def scan_lines(path: str) -> Iterator[Extent]:
    """Extents of the lines of `path` that are not blank."""
    start, line, held = 0, 1, b""
    for block in _blocks(path):
        held += block
        *lines, held = held.split(b"\n")
        for text in lines:
            if text.strip(_BLANKS):
                yield Extent(start, start + len(text), line)
            start, line = start + len(text) + 1, line + 1
    if held.strip(_BLANKS):
        yield Extent(start, start + len(held), line)


def scan_array(path: str) -> Iterator[Extent]:
    """Extents of the elements of the JSON array in `path`."""
    scanner = _ArrayScanner(path)
    for block in _blocks(path):
        yield from scanner.feed(block)
    scanner.close()


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
        return json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        return RowError("row_malformed", f"not UTF-8: byte {error.object[error.start]:#04x} at offset {error.start}")
    except (ValueError, RecursionError) as error:
        return RowError("row_malformed", f"not valid JSON: {error}")


def _lines_of(data: bytes, span: Span) -> Iterator[tuple[str, bytes]]:
    for line, text in enumerate(data.split(b"\n"), start=span.first_line):
        if text.strip(_BLANKS):
            yield str(line), text


def _elements_of(data: bytes, span: Span, path: str) -> Iterator[tuple[str, bytes]]:
    scanner = _ArrayScanner(path, inside=True, line=span.first_line)
    for row, extent in enumerate(_until_end(scanner, data), start=span.first_row):
        yield f"{extent.line} (element {row})", data[extent.start : extent.stop]


def _until_end(scanner: _ArrayScanner, data: bytes) -> Iterable[Extent]:
    # A span ends after its last element; the bracket that closes the array there makes the scanner yield it.
    yield from scanner.feed(data)
    yield from scanner.feed(b"]")


def _blocks(path: str) -> Iterator[bytes]:
    with storage.open_file(path, _BLOCK) as file:
        while block := file.read(_BLOCK):
            yield block


class _ArrayScanner:
    """Finds the elements of a JSON array in blocks of bytes as they come."""

    def __init__(self, path: str, inside: bool = False, line: int = 1) -> None:
        self.path = path
        self.depth = 1 if inside else 0  # open brackets, the array's own included
        self.state = "inside" if inside else "before"
        self.buffer = b""  # from the start of the element under way
        self.base = 0  # offset of the buffer in the file
        self.line = line  # at the start of the element under way
        self.cursor = 0  # the buffer is scanned up to here

    def feed(self, block: bytes) -> Iterator[Extent]:
        """The elements that end in `block`."""
        self.buffer += block
        if self.state == "before":
            self._enter()
        begin = 0
        if self.state == "inside":
            for token in _TOKEN.finditer(self.buffer, self.cursor):
                if token.group(1) == b"":  # a string that goes on in the next block
                    break
                self.cursor = token.end()
                ends = self._ends_element(token.group())
                if ends:
                    extent = self._extent(begin, token.start())
                    begin = token.end()
                    if self.state == "inside" or extent.start < extent.stop:  # "[]" and a last comma hold no element
                        yield extent
                if self.state == "after":
                    break
            self._drop(begin)
        if self.state == "after" and self.buffer.strip(_BLANKS):
            raise FileFormatError(f"{self.path}:{self.line}: the array ends here, but the file goes on")

    def close(self) -> None:
        """Raise FileFormatError unless the array has ended."""
        if self.state == "before":
            raise FileFormatError(f"{self.path}: the file is empty")
        if self.state == "inside":
            raise FileFormatError(
                f"{self.path}: the array is not closed: the file is cut short, or a bracket is missing"
            )

    def _enter(self) -> None:
        text = self.buffer.removeprefix(_BOM).lstrip(_BLANKS)
        if not text:
            return
        if text[:1] != b"[":
            raise FileFormatError(
                f"{self.path}: begins with {text[:20]!r}, not with '[': a .json corpus is one array of rows; "
                "name a file with a row on each line .jsonl"
            )
        self.state, self.depth = "inside", 1
        before = len(self.buffer) - len(text) + 1
        self.line += self.buffer.count(b"\n", 0, before)
        self._drop(before)

    def _ends_element(self, token: bytes) -> bool:
        byte = token[:1]
        if byte == b",":
            return self.depth == 1
        if len(token) == 1 and byte in b"[{":
            self.depth += 1
        elif byte in b"]}":
            self.depth -= 1
            if self.depth == 0:
                self.state = "after"
                return True
        return False

    def _extent(self, begin: int, end: int) -> Extent:
        text = self.buffer[begin:end]
        body = text.lstrip(_BLANKS)
        blank = len(text) - len(body)
        start, line = self.base + begin + blank, self.line + text.count(b"\n", 0, blank)
        self.line += text.count(b"\n")
        return Extent(start, start + len(body.rstrip(_BLANKS)), line)

    def _drop(self, count: int) -> None:
        self.base += count
        self.cursor = max(self.cursor - count, 0)
        self.buffer = self.buffer[count:]
