"""The elements of a JSON array, found in blocks of bytes as they come, by strings, brackets and commas alone.

A quote or a bracket too many or too few would make one row of many. So a row of an array that cannot be parsed ends
where another one opens, as the file's first row does: with the same key. What is found does not depend on where a
reader begins, as long as it begins at a row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace

from pipelines import storage
from pipelines.corpora.spans import Extent, Span
from pipelines.records import FileFormatError

BLANKS = b" \t\r\n"
"""What JSON allows around its values."""
BOM = b"\xef\xbb\xbf"
# A string, an object without brackets in it (a turn of a conversation: most of the file in one match), or a bracket or
# comma. A string that does not end in this block leaves group 1 empty. Possessive quantifiers: nothing is read twice.
_STRING = rb'"(?:[^"\\]++|\\.)*+'
_TOKEN = re.compile(_STRING + rb'("?)|\{(?:[^"{}\[\]]++|' + _STRING + rb'")*+\}|[\[\]{},]', re.DOTALL)
_NO_BLANK = re.compile(rb"[^ \t\r\n]")
_HEAD = 2**16  # bytes of a file in which its first row opens
_LONG = 64 * 2**20  # bytes of a row from which on it is looked whether it is one
_FIRST_KEY = re.compile(rb'(?:\xef\xbb\xbf)?\s*\[\s*\{\s*("(?:[^"\\]|\\.)*+")\s*:')


class ArrayScanner:
    """Finds the elements of a JSON array in blocks of bytes as they come: of a whole file, or of `span` of it."""

    def __init__(self, path: str, span: Span | None = None) -> None:
        self.path = path
        self.depth = 1 if span else 0  # open brackets, the array's own included
        self.state = "inside" if span else "before"
        self.buffer = b""
        self.base = 0  # offset of the buffer in the file, or in the span
        self.begin = 0  # of the element under way, in the buffer
        self.line = span.first_line if span else 1  # at the start of the element under way
        self.cursor = 0  # the buffer is scanned up to here
        self.key = _first_key(storage.read_range(path, 0, _HEAD))  # with which rows open
        self.own = re.compile(rb"\s*\{\s*" + re.escape(self.key))  # a row that opens, at its own begin
        self.other = re.compile(rb'[}\],"]\s*(\{\s*' + re.escape(self.key) + rb"\s*:)")  # one that opens after another

    def feed(self, block: bytes) -> Iterator[Extent]:
        """The elements that end in `block`."""
        self.buffer += block
        if self.state == "before":
            self._enter()
        while self.state == "inside":
            token = self._end()
            is_long = len(self.buffer) - self.begin > _LONG
            opening = self._opening(token.start() if token else len(self.buffer)) if token or is_long else None
            if opening is not None:
                yield self._cut(opening)
            elif token is None:
                break
            else:
                extent = self._extent(token.start())
                self.begin = token.end()
                if self.state == "inside" or extent.start < extent.stop:  # "[]" and a last comma hold no element
                    yield extent
        self._drop()
        if self.state == "after" and self.buffer.strip(BLANKS):
            raise FileFormatError(f"{self.path}:{self.line}: the array ends here, but the file goes on")

    def rest(self) -> Iterator[Extent]:
        """The last elements of a span, which ends where an element does."""
        while (opening := self._opening(len(self.buffer))) is not None:
            yield self._cut(opening)
            yield from self.feed(b"")
        yield self._extent(len(self.buffer))

    def close(self) -> Iterator[Extent]:
        """The last elements of a file; raises FileFormatError unless the array has ended."""
        if self.state == "before":
            raise FileFormatError(f"{self.path}: the file is empty")
        while self.state == "inside":
            end = self.cursor if self._ends_with_bracket else len(self.buffer)
            if (opening := self._opening(end)) is not None:
                yield self._cut(opening)
                yield from self.feed(b"")
                continue
            if not self._ends_with_bracket:
                break
            self.state = "after"
            if (extent := self._extent(end)).start < extent.stop:
                yield extent
        if self.state == "inside":
            line = self._extent(len(self.buffer)).line
            raise FileFormatError(
                f"{self.path}: the array is not closed: the file is cut short, or the row that begins on line {line} "
                "lacks a bracket or a quote"
            )

    @property
    def _ends_with_bracket(self) -> bool:
        return self.depth == 1 and self.buffer[self.cursor :].strip(BLANKS) == b"]"

    def _enter(self) -> None:
        text = self.buffer.removeprefix(BOM).lstrip(BLANKS)
        if not text:
            return
        if text.startswith(b"PAR1"):
            raise FileFormatError(f"{self.path}: a Parquet file: say so of its source, format: parquet")
        if text[:1] != b"[":
            raise FileFormatError(
                f"{self.path}: begins with {text[:20]!r}, not with '[': a .json corpus is one array of rows; "
                "name a file with a row on each line .jsonl"
            )
        self.state, self.depth = "inside", 1
        self.begin = self.cursor = len(self.buffer) - len(text) + 1
        self.line += self.buffer.count(b"\n", 0, self.begin)

    def _end(self) -> re.Match[bytes] | None:
        """The comma or bracket that ends the element under way."""
        for token in _TOKEN.finditer(self.buffer, self.cursor):
            if token.group(1) == b"":  # a string that goes on in the next block
                return None
            if self.depth == 1 and token.group() == b"]":
                follows = _NO_BLANK.search(self.buffer, token.end())
                if follows is None:  # the end of the array, unless the next block goes on
                    self.cursor = token.start()
                    return None
                if follows.group() in b'},"':  # the end of a list, in a row that is broken
                    continue
            self.cursor = token.end()
            if self._ends_element(token.group()):
                return token
        return None

    def _ends_element(self, token: bytes) -> bool:
        byte = token[:1]
        if byte == b",":
            return self.depth == 1
        if len(token) == 1 and byte in b"[{":
            self.depth += 1
        elif byte == b"}" and self.depth == 1:
            return False  # one too many: the array ends with another bracket
        elif byte in b"]}":
            self.depth -= 1
            if self.depth == 0:
                self.state = "after"
                return True
        return False

    def _opening(self, end: int) -> int | None:
        """Where, before `end`, another row opens in the element under way; None where that is one row."""
        # A broken row may lack the key. To ask for two of them all the same would make its end depend on how many rows
        # follow it before `end`, which is that of a span.
        own = self.own.match(self.buffer, self.begin, end) is not None
        if self.buffer.count(self.key, self.begin, end) < 1 + own:
            return None
        text = self.buffer[self.begin : end]
        # Not within a value that is whole: rows may hold objects that open as rows do.
        found = self.other.search(text) and self.other.search(text, max(_value_end(text) - 1, 0))
        return self.begin + found.start(1) if found else None

    def _cut(self, opening: int) -> Extent:
        """The broken element under way, which ends before the row that opens there."""
        extent = self._extent(opening)
        text = self.buffer[extent.start - self.base : extent.stop - self.base]
        self.begin = self.cursor = opening
        self.depth, self.state = 1, "inside"
        return replace(extent, stop=extent.start + len(text.removesuffix(b",").rstrip(BLANKS)))

    def _extent(self, end: int) -> Extent:
        text = self.buffer[self.begin : end]
        body = text.lstrip(BLANKS)
        blank = len(text) - len(body)
        start, line = self.base + self.begin + blank, self.line + text.count(b"\n", 0, blank)
        self.line += text.count(b"\n")
        size = len(body.rstrip(BLANKS))
        return Extent(start, start + size, line, size)

    def _drop(self) -> None:
        self.base += self.begin
        self.cursor = max(self.cursor - self.begin, 0)
        self.buffer, self.begin = self.buffer[self.begin :], 0


def _first_key(head: bytes) -> bytes:
    """The first key of the first row of an array that begins with `head`, in its quotes."""
    found = _FIRST_KEY.match(head)
    return found.group(1) if found else b'"id"'  # as in most corpora, where that row is broken itself


def _value_end(text: bytes) -> int:
    """Where the JSON value ends with which `text` begins; 0 where that is none."""
    start = len(text) - len(text.lstrip(BLANKS))
    try:
        # What is not ASCII stands in strings, whatever it spells there. One character a byte: the end is one in bytes.
        return json.JSONDecoder().raw_decode(text.decode("latin-1"), start)[1]
    except (ValueError, RecursionError):
        return 0
