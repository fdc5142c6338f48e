"""What goes over the wire: the part of the OpenAI chat API that this service speaks, and its errors.

A field that is not listed is refused by name. To ignore it would be to answer another question than the one asked.
"""

from __future__ import annotations

import base64
import binascii
import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flashsloth.conversation import ConversationError, read_conversation
from flashsloth.image_processing_flashsloth import ImageError, decode_image
from pipelines.serving.engine import Answer, Prompt
from pipelines.serving.sampling import Sampling
from pipelines.serving.settings import Limits


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape.

    Attributes:
        status: HTTP status.
        message: what is wrong and what would be right.
        param: the field that is to blame, where one is.
        code: stable, meant for programs.
    """

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(status, message, code, param)
        self.status, self.message, self.code, self.param = status, message, code, param

    def body(self) -> dict[str, Any]:
        """The JSON that clients of the OpenAI API expect."""
        kind = "invalid_request_error" if self.status < 500 and self.status != 429 else "server_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class _Wire(BaseModel):
    model_config = ConfigDict(extra="forbid")


class TextPart(_Wire):
    """A part of a message: text."""

    type: Literal["text"]
    text: str


class ImageUrl(_Wire):
    """Where an image is: a data URI."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"  # accepted for clients that always send it: the tiling is trained


class ImagePart(_Wire):
    """A part of a message: an image."""

    type: Literal["image_url"]
    image_url: ImageUrl


class ChatMessage(_Wire):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class ChatRequest(_Wire):
    """The body of `POST /v1/chat/completions`. The temperature defaults to 0: an answer about a picture is no draw."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    stop: str | list[str] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    n: Literal[1] | None = None
    stream: Literal[False] | None = None
    presence_penalty: float | None = Field(default=None, ge=0, le=0)
    frequency_penalty: float | None = Field(default=None, ge=0, le=0)
    user: str | None = None


def parse_request(body: bytes, model_name: str) -> ChatRequest:
    """Read a request's body.

    Raises:
        ApiError: 422 for what is no such request, 404 for a model that is not served.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        # Of a union's branch only the field itself is of interest.
        param = ".".join(str(part) for part in first["loc"]) or None
        raise ApiError(422, _explain(first["type"], param, first["msg"]), "invalid_request", param) from error
    if request.model != model_name:
        raise ApiError(
            404, f"the model {request.model!r} is not served here; {model_name!r} is", "model_not_found", "model"
        )
    return request


def unknown_model(asked: str, served: str) -> ApiError:
    """The error for a model that is not the one that is served."""
    return ApiError(404, f"the model {asked!r} is not served here; {served!r} is", "model_not_found", "model")


def read_sampling(request: ChatRequest, limits: Limits) -> Sampling:
    """How the answer is to be drawn; raises `ApiError` (422) for more than the limits allow."""
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise ApiError(
            422, "give max_tokens or max_completion_tokens, not both", "invalid_request", "max_completion_tokens"
        )
    asked = request.max_completion_tokens if request.max_tokens is None else request.max_tokens
    if asked is not None and asked > limits.max_tokens:
        raise ApiError(
            422, f"max_tokens is {asked}, at most {limits.max_tokens} are allowed", "max_tokens_too_large", "max_tokens"
        )
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    if len(stops) > 4 or not all(stops):
        raise ApiError(422, f"stop takes 1 to 4 texts that are not empty, got {stops!r}", "invalid_request", "stop")
    return Sampling(
        max_tokens=asked or min(limits.default_max_tokens, limits.max_tokens),
        temperature=request.temperature or 0.0,
        top_p=1.0 if request.top_p is None else request.top_p,
        stop=tuple(stops),
        seed=request.seed,
    )


def read_messages(request: ChatRequest, limits: Limits) -> tuple[list[dict[str, str]], Any]:
    """Plain messages, and the image (PIL, RGB) or None.

    Raises:
        ApiError: 422 for an image that is a URL, cannot be used, or stands anywhere but in the first user message.
    """
    try:
        # The first pass looks at the structure with the images left encoded, so that a misplaced one costs nothing.
        _check_image_places(request)
        return read_conversation([_decode(message, limits) for message in request.messages])
    except (ConversationError, ImageError) as error:
        raise ApiError(422, error.detail, error.reason, "messages") from error


def completion(request_id: str, model_name: str, prompt: Prompt, answer: Answer) -> dict[str, Any]:
    """The response's body for one answer."""
    spent, given = len(prompt.input_ids), len(answer.token_ids)
    return {
        "id": f"chatcmpl-{request_id}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": model_name,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": answer.text},
                "finish_reason": answer.finish_reason,
                "logprobs": None,
            }
        ],
        "usage": {"prompt_tokens": spent, "completion_tokens": given, "total_tokens": spent + given},
    }


def _explain(kind: str, param: str | None, message: str) -> str:
    if kind == "extra_forbidden":
        return f"the field {param!r} is not supported"
    if param == "stream":
        return "streaming is not supported; leave out stream"
    return f"{param}: {message}" if param else message


def _check_image_places(request: ChatRequest) -> None:
    seen = 0
    for index, message in enumerate(request.messages):
        for part in message.content if isinstance(message.content, list) else []:
            if isinstance(part, TextPart):
                continue
            seen += 1
            if index > 0 or message.role != "user" or seen > 1:
                where = f"message {index} ({message.role})"
                raise ConversationError("image_misplaced", f"{where}: one image at most, in the first user message")


def _decode(message: ChatMessage, limits: Limits) -> dict[str, Any]:
    if isinstance(message.content, str):
        return message.model_dump()
    parts: list[dict[str, Any]] = []
    for part in message.content:
        if isinstance(part, TextPart):
            parts.append(part.model_dump())
        else:
            image = decode_image(_data_of(part.image_url.url), max_pixels=limits.max_image_pixels)
            parts.append({"type": "image", "image": image})
    return {"role": message.role, "content": parts}


def _data_of(url: str) -> bytes:
    """The bytes in a data URI. Addresses are never followed: they would reach whatever this machine can reach."""
    header, comma, payload = url.partition(",")
    if not header.startswith("data:"):
        scheme = url.split(":", 1)[0][:20]
        raise ConversationError(
            "image_url_not_allowed", f"image_url is a {scheme} address, which is not fetched; send a data URI (base64)"
        )
    if not comma or not header.endswith(";base64"):
        raise ConversationError("unsupported_content", "image_url is a data URI without base64 content")
    try:
        return base64.b64decode(payload, validate=True)
    except binascii.Error as error:
        raise ImageError("image_undecodable", f"image_url is no valid base64: {error}") from error
