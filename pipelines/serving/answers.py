"""What the engine answers: tokens become text piece by piece, and reach whoever asked."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

FinishReason = Literal["stop", "length", "deadline", "cancelled", "error"]


@dataclass(frozen=True)
class Chunk:
    """What is new of an answer since the chunk before.

    Attributes:
        token_ids: the tokens since then, without the end of sequence. Their text may still be held back.
        text: never a part of a stop text or of a character; the texts of all chunks together are the answer's.
        finish_reason: None but in the last chunk. "stop" at an end of sequence or a stop text, "length" at
            `max_tokens`, "deadline" when the time was over, "cancelled" when nobody listens any more, "error".
        error: what went wrong, where the reason is "error".
    """

    token_ids: list[int]
    text: str
    finish_reason: FinishReason | None = None
    error: str | None = None


@dataclass(frozen=True)
class Answer:
    """What came out for one prompt.

    Attributes:
        token_ids: the generated tokens, without the end of sequence.
        text: the answer, without special tokens, cut before a stop string, nothing around it.
        finish_reason: as in the last `Chunk`.
    """

    token_ids: list[int]
    text: str
    finish_reason: FinishReason

    @classmethod
    def join(cls, chunks: Iterable[Chunk]) -> Answer:
        """The answer that `chunks`, the last one included, make."""
        chunks = list(chunks)
        reason = chunks[-1].finish_reason
        assert reason is not None
        ids = [token_id for chunk in chunks for token_id in chunk.token_ids]
        return cls(ids, "".join(chunk.text for chunk in chunks), reason)


class Transcript:
    """The text of one answer. Releases what can no longer change; space at either end is never released."""

    def __init__(self, tokenizer: Tokenizer, stops: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._stops = stops
        self._stream = DecodeStream(skip_special_tokens=True)  # holds incomplete characters back
        self._token_ids: list[int] = []
        self._num_decoded = 0
        self._held = ""
        self._started = False
        self._stopped = False

    def push(self, token_id: int) -> bool:
        """Append a token; True where the text has reached a stop text, from which on it is cut."""
        self._token_ids.append(token_id)
        piece = self._stream.step(self._tokenizer, token_id)
        if piece is None:
            return False
        self._num_decoded += len(piece)
        self._held += piece
        if self._stops:
            found = [self._held.index(stop) for stop in self._stops if stop in self._held]
            if found:
                self._held, self._stopped = self._held[: min(found)], True
        return self._stopped

    def release(self) -> str:
        """The text since the last call, without an end that could be the start of a stop text."""
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        return self._take(self._held[: len(self._held) - keep].rstrip())

    def finish(self) -> str:
        """The rest of the text, the replacement of an unfinished character included."""
        if not self._stopped:
            self._held += self._tokenizer.decode(self._token_ids, skip_special_tokens=True)[self._num_decoded :]
        return self._take(self._held.rstrip())

    def _take(self, text: str) -> str:
        self._held = self._held[len(text) :]
        if not self._started:
            text = text.lstrip()
            self._started = bool(text)
        return text


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` could be the first ones of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(stop[:length])), 0)
