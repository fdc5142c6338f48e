"""Conversations: turns -> pieces of a sequence, for the chat and the caption layout.

    chat     <system> USER: <image>\\n<question><query> ASSISTANT: <answer></s>USER: <question><query> ASSISTANT: ...
    caption  <image><caption><query>\\n

A piece is either text or one structural mark. Marks are put in by place and become ids directly; text is tokenized as
text whatever it spells. So a question that contains "<image>", "</s>" or "ASSISTANT:" stays a question.

Pieces break where a mark stands, and between a non-space and a space ("USER:" | " What"). Byte-level BPE never
merges across the second kind, so the ids are those of the published preprocessing, and a prompt is, token for token,
the beginning of the training sample.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from .image_processing_flashsloth import ImageError, decode_image, is_data_uri, read_data_uri

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
TEMPLATE_VERSION = 1  # part of a processor's identity: raise it when the pieces below change

Message = Mapping[str, Any]


class ConversationError(ValueError):
    """A conversation that cannot be laid out.

    Attributes:
        reason: one of conversation_empty, malformed_message, role_order, empty_question, empty_answer,
            caption_without_image, unsupported_content, image_misplaced, too_long; stable, meant for counting.
        detail: what was found and what would do, for a person.
    """

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)  # both in args: the error crosses processes by pickle
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Piece:
    """One stretch of the sequence.

    Attributes:
        kind: "text", or the mark that stands here.
        text: what to tokenize, empty for marks.
        turn: k where the piece belongs to the question (or the query tokens) of turn k = 1, 2, ..., else 0.
        learned: whether the loss counts these tokens.
    """

    kind: Literal["text", "image", "query", "eos"]
    text: str = ""
    turn: int = 0
    learned: bool = False


def chat_pieces(messages: Sequence[Message], has_image: bool, system: str, query_separator: str) -> list[Piece]:
    """Lays out turns for instruction tuning (ends with an answer) or for inference (ends with a question).

    Args:
        messages: `{"role": "user" | "assistant", "content": str}`, in turns, without image markers.
        has_image: puts the image before the first question.
        system: text before the first turn.
        query_separator: text between a question and its query tokens.

    Raises:
        ConversationError: conversation_empty, malformed_message, role_order, empty_question; of a sample, empty_answer.
    """
    _check_turns(messages)
    is_sample = messages[-1]["role"] == "assistant"  # nothing is learned from a prompt, not even its earlier answers
    pieces = [Piece("text", f"{system} USER:" if system else "USER:")]
    for index, message in enumerate(messages):
        turn, content = index // 2 + 1, message["content"]
        if message["role"] == "assistant":
            if content:  # an earlier answer may be empty in a prompt: there the model ended at once
                pieces.append(Piece("text", " " + content, learned=is_sample))
            pieces.append(Piece("eos", learned=is_sample))
            continue
        if turn > 1:
            pieces.append(Piece("text", "USER:"))
        if turn == 1 and has_image:
            pieces += [Piece("text", " "), Piece("image"), Piece("text", "\n")]
            pieces.append(Piece("text", content + query_separator, turn=turn))
        else:
            pieces.append(Piece("text", " " + content + query_separator, turn=turn))
        pieces += [Piece("query", turn=turn), Piece("text", " ASSISTANT:")]
    return pieces


def caption_pieces(messages: Sequence[Message], has_image: bool) -> list[Piece]:
    """Lays out one instruction and its caption for alignment; the instruction is thrown away.

    The query tokens follow the caption, so there is no prompt in this layout: it is for training alone.

    Raises:
        ConversationError: role_order for anything but one user and one assistant message, empty_answer,
            caption_without_image, and what `chat_pieces` raises for malformed messages.
    """
    _check_messages(messages)
    if [message["role"] for message in messages] != ["user", "assistant"]:
        raise ConversationError(
            "role_order", f"the caption layout takes one user and one assistant message, not {_roles(messages)}"
        )
    caption = messages[1]["content"]
    if _is_blank(caption):
        raise ConversationError("empty_answer", "the caption is empty")
    if not has_image:
        raise ConversationError("caption_without_image", "the caption layout needs an image; use the chat layout")
    return [
        Piece("image"),
        Piece("text", caption, turn=1, learned=True),
        Piece("query", turn=1),
        Piece("text", "\n", learned=True),
    ]


def read_conversation(conversation: Sequence[Message]) -> tuple[list[dict[str, str]], Image.Image | None]:
    """Separates a conversation with typed content into plain messages and its image.

    Content is a string or a list of parts: `{"type": "text", "text"}`, `{"type": "image", "image" | "url"}`
    (Hugging Face) and `{"type": "image_url", "image_url": {"url"}}` (OpenAI). An image is a Pillow picture, encoded
    bytes or a base64 data URI. Nothing is fetched and no path is opened: whoever has an address loads it first.

    Raises:
        ConversationError: malformed_message, unsupported_content; image_misplaced for a second image or one that is
            not in the first user message.
        ImageError: if the image cannot be decoded.
    """
    messages: list[dict[str, str]] = []
    image: Image.Image | None = None
    for index, message in enumerate(conversation):
        if not isinstance(message, Mapping) or "role" not in message or "content" not in message:
            raise ConversationError("malformed_message", f"message {index} lacks a role or content")
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, Sequence) or not all(isinstance(part, Mapping) for part in parts):
            raise ConversationError(
                "malformed_message", f"message {index}: content is neither text nor a list of parts"
            )
        texts = []
        for part in parts:
            if part.get("type") == "text" and isinstance(part.get("text"), str):
                texts.append(part["text"])
                continue
            source = _image_source(part, index)
            if index > 0 or message["role"] != "user" or image is not None:
                where = f"message {index} ({message['role']})"
                raise ConversationError("image_misplaced", f"{where}: one image at most, in the first user message")
            image = _load_image(source, index)
        messages.append({"role": message["role"], "content": "\n".join(texts)})
    return messages, image


def _check_turns(messages: Sequence[Message]) -> None:
    _check_messages(messages)
    for index, message in enumerate(messages):
        expected = ("user", "assistant")[index % 2]
        if message["role"] != expected:
            remedy = ""
            if message["role"] in ("system", "developer"):
                remedy = (
                    "; the system text is the processor's (its `system` argument), which the model was trained with, "
                    "not the conversation's: say it in the first question"
                )
            raise ConversationError("role_order", f"message {index} is {message['role']!r}, not {expected!r}{remedy}")
        # The model can say nothing, and is asked on; to learn that is another matter.
        if _is_blank(message["content"]) and (expected == "user" or messages[-1]["role"] == "assistant"):
            reason = "empty_question" if expected == "user" else "empty_answer"
            raise ConversationError(reason, f"message {index} ({expected}) has no text")


def _is_blank(text: str) -> bool:
    """Whether nothing of `text` can be seen: blanks, line ends, and format characters such as U+200B and U+FEFF."""
    return all(character.isspace() or unicodedata.category(character) == "Cf" for character in text)


def _check_messages(messages: Sequence[Message]) -> None:
    if not messages:
        raise ConversationError("conversation_empty", "no messages")
    for index, message in enumerate(messages):
        if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise ConversationError("malformed_message", f"message {index} needs a role and a content, both strings")


def _roles(messages: Sequence[Message]) -> list[str]:
    return [message["role"] for message in messages]


def _image_source(part: Mapping[str, Any], index: int) -> Any:
    kind = part.get("type")
    if kind == "image_url":
        url = part.get("image_url")
        return url.get("url") if isinstance(url, Mapping) else url
    if kind == "image":
        return part.get("image", part.get("url"))
    raise ConversationError(
        "unsupported_content", f"message {index}: a part of type {kind!r}; text, image and image_url are understood"
    )


def _load_image(source: Any, index: int) -> Image.Image:
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, bytes):
        return decode_image(source)
    if isinstance(source, str) and is_data_uri(source):
        try:
            return decode_image(read_data_uri(source))
        except ImageError as error:
            raise ImageError(error.reason, f"message {index}: {error.detail}") from error
    found = f"{source[:40]!r}" if isinstance(source, str) else type(source).__name__
    raise ConversationError(
        "unsupported_content", f"message {index}: an image is a data URI, bytes or a PIL image, not {found}"
    )
