"""One row of any corpus, before tokens and pixels: what a corpus reader yields and preparation consumes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict


class Message(TypedDict):
    """One turn: `role` is user, assistant or system; `content` is plain text without image markers."""

    role: str
    content: str


_LONGEST_DETAIL = 700  # characters
_HEAD, _TAIL = 400, 200  # with what is said of the rest no longer than that, so that nothing is shortened twice


def shortened(detail: str) -> str:
    """`detail` without its middle where it is long: a row may hold a whole image where a path is due.

    It stands in receipts, in the table of quarantined rows and in errors.
    """
    if len(detail) <= _LONGEST_DETAIL:
        return detail
    left_out = len(detail) - _HEAD - _TAIL
    return f"{detail[:_HEAD]} ... ({left_out:,} characters left out) ... {detail[-_TAIL:]}"


def storable(text: str) -> str:
    """`text` as UTF-8 can spell it: halves of surrogate pairs, which JSON may bring, are escaped."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


@dataclass(frozen=True)
class Record:
    """A conversation about at most one image."""

    messages: list[Message]
    id: str = ""
    """The corpus's own name of the row. It may repeat: the LLaVA-1.5 mix uses image numbers as ids."""
    image: str | bytes | None = None
    """Path below the corpus's image root, or the encoded bytes themselves; None for a text-only row."""
    question_types: list[str] = field(default_factory=list)
    """One kind of question per user turn, or empty where the corpus has none."""


@dataclass(frozen=True)
class Row:
    """A row as it lies in the corpus: its parsed record, or why it is none."""

    position: int
    """Number of the row in its file, from 0: with the source's name it makes the row's key."""
    location: str
    """Where a person finds it: `file:line`, or the element of an array."""
    content: Record | RowError


class FileFormatError(ValueError):
    """A file as a whole is not what its format says; the message names it."""


class RowError(ValueError):
    """A row that cannot become a sample.

    Attributes:
        reason: one word for the table of reasons, such as `row_malformed`.
        detail: what exactly is wrong, for a person; storable and shortened.
        id: the corpus's own id of the row, where it could be read; storable.
    """

    def __init__(self, reason: str, detail: str, id: str = "") -> None:
        self.reason, self.detail, self.id = reason, shortened(storable(detail)), storable(id)
        super().__init__(f"{reason}: {self.detail}")

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str, str]]:
        return type(self), (self.reason, self.detail, self.id)
