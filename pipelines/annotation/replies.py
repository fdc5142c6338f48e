"""What a service answers, as far as an annotation reads it. Whatever else answers with status 200 is told from it."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, Field, ValidationError


class Model(BaseModel):
    """A model of the service."""

    id: str
    hash: str | None = None
    """Of its checkpoint; ours tells it."""


class ModelList(BaseModel):
    """What `GET /models` answers."""

    data: list[Model]


class Message(BaseModel):
    """What was said."""

    content: str | None = None


class Choice(BaseModel):
    """One answer."""

    message: Message
    finish_reason: str | None = None


class Usage(BaseModel):
    """What it cost, in tokens."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class Completion(BaseModel):
    """What `POST /chat/completions` answers."""

    choices: list[Choice] = Field(min_length=1)
    usage: Usage | None = None
    system_fingerprint: str | None = None


Reply = TypeVar("Reply", bound=BaseModel)


class NoReplyError(ValueError):
    """A response is no reply of this API; the message says in a line what is wrong with it."""


def read_reply(kind: type[Reply], body: bytes) -> Reply:
    """The reply in the body of a response.

    Raises:
        NoReplyError: there is none.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise NoReplyError(f"{place}: {first['msg']}" if place else first["msg"]) from error
