"""One row of any corpus, before tokens and pixels: what a corpus reader yields and preparation consumes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypedDict


class Message(TypedDict):
    """One turn: `role` is user, assistant or system; `content` is plain text without image markers."""

    role: str
    content: str


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
        detail: what exactly is wrong, for a person.
        id: the corpus's own id of the row, where it could be read.
    """

    def __init__(self, reason: str, detail: str, id: str = "") -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail, self.id = reason, detail, id

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str, str]]:
        return type(self), (self.reason, self.detail, self.id)
