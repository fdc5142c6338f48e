"""What clients send: the part of the OpenAI chat API that this service speaks.

A field that is not listed is refused by name. To ignore it would be to answer another question than the one asked. What
this service does not do may be named where the value says that it is not asked for: clients spell out their defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, StringConstraints, Tag, ValidationError

from flashsloth.conversation import ConversationError, read_conversation
from flashsloth.image_processing_flashsloth import ImageError, decode_image, is_data_uri, read_data_uri
from pipelines.serving.engine_settings import MAX_STOP_LENGTH
from pipelines.serving.errors import ApiError, shown, unknown_model
from pipelines.serving.sampling import Sampling
from pipelines.serving.settings import Limits
from pipelines.serving.wire import NUMBER, TRUTH, Wire, at_most, nothing_but

_TEXT, _PARTS = "<text>", "<parts>"  # a message's content; not to be mixed up with the name of a field
# A body may have room for millions of entries that are each no message: the first fault ends the reading of a list.
_MOST_ENTRIES = 4096  # of a list: messages, parts of one. No prompt holds as many
_MOST_STOPS = 4
_MOST_METADATA = 16  # as OpenAI has it


class TextPart(Wire):
    """A part of a message: text."""

    type: Literal["text"]
    text: str


class ImageUrl(Wire):
    """Where an image is: a data URI or, for hosts that are allowed, an http(s) address."""

    url: Annotated[str, StringConstraints(strip_whitespace=True)]
    detail: Literal["auto", "low", "high", "original"] | None = None
    """"low" lets an HD checkpoint see no more of the picture than its first tile shows. Others see no more anyway."""


class ImagePart(Wire):
    """A part of a message: an image."""

    type: Literal["image_url"]
    image_url: ImageUrl


def _kind_of_content(content: Any) -> str | None:
    return _TEXT if isinstance(content, str) else _PARTS if isinstance(content, list) else None


class ChatMessage(Wire):
    """One turn; an answer of this API can be put back as it came."""

    role: Literal["system", "developer", "user", "assistant"]  # the first two are refused later, with a remedy
    content: Annotated[
        Annotated[str, Tag(_TEXT)]
        | Annotated[
            list[Annotated[TextPart | ImagePart, Field(discriminator="type")]],
            Field(fail_fast=True, max_length=_MOST_ENTRIES),
            Tag(_PARTS),
        ],
        Discriminator(_kind_of_content, "content", "a text, or a list of parts, is expected"),
    ]
    annotations: Annotated[Any, nothing_but([])] = None
    tool_calls: Annotated[Any, nothing_but([])] = None


class StreamOptions(Wire):
    """What a stream tells beside the answer."""

    include_usage: Annotated[bool | None, TRUTH] = None
    include_obfuscation: Annotated[Any, nothing_but(False)] = None


class ChatRequest(Wire):
    """The body of `POST /v1/chat/completions`. The temperature defaults to 0: an answer about a picture is no draw."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1, max_length=_MOST_ENTRIES, fail_fast=True)
    max_tokens: Annotated[int | None, NUMBER] = Field(default=None, ge=1)
    max_completion_tokens: Annotated[int | None, NUMBER] = Field(default=None, ge=1)
    temperature: Annotated[float | None, NUMBER] = Field(default=None, ge=0, le=2)
    top_p: Annotated[float | None, NUMBER] = Field(default=None, gt=0, le=1)
    stop: Annotated[list[str] | None, BeforeValidator(lambda stop: [stop] if isinstance(stop, str) else stop)] = Field(
        default=None, fail_fast=True
    )
    seed: Annotated[int | None, NUMBER] = Field(default=None, ge=-(2**63), lt=2**63)
    n: Annotated[Literal[1] | None, NUMBER] = None
    stream: Annotated[bool | None, TRUTH] = None
    stream_options: StreamOptions | None = None
    presence_penalty: Annotated[Any, NUMBER, nothing_but(0)] = None
    frequency_penalty: Annotated[Any, NUMBER, nothing_but(0)] = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    metadata: Annotated[dict[str, str] | None, at_most(_MOST_METADATA)] = None
    service_tier: Annotated[Any, nothing_but("auto", "default")] = None
    logprobs: Annotated[Any, nothing_but(False)] = None
    top_logprobs: Annotated[Any, nothing_but(0)] = None
    logit_bias: Annotated[Any, nothing_but({})] = None
    tools: Annotated[Any, nothing_but([])] = None
    tool_choice: Annotated[Any, nothing_but("none", "auto")] = None
    functions: Annotated[Any, nothing_but([])] = None
    function_call: Annotated[Any, nothing_but("none", "auto")] = None
    reasoning_effort: Annotated[Any, nothing_but("none")] = None
    verbosity: Annotated[Any, nothing_but("medium")] = None
    parallel_tool_calls: Annotated[Any, nothing_but(False, True)] = None
    response_format: Annotated[Any, nothing_but({"type": "text"})] = None
    modalities: Annotated[Any, nothing_but(["text"])] = None
    store: Annotated[Any, nothing_but(False)] = None

    @property
    def image_addresses(self) -> list[str]:
        """The images that are to be fetched."""
        lists = [message.content for message in self.messages if isinstance(message.content, list)]
        parts = [part for parts in lists for part in parts if isinstance(part, ImagePart)]
        return [part.image_url.url for part in parts if not is_data_uri(part.image_url.url)]


def parse_request(body: bytes, model_name: str) -> ChatRequest:
    """Read a request's body, and check what can be checked without decoding an image.

    Raises:
        ApiError: 422 for what is no such request, 404 for a model that is not served.
    """
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        param = _field(first["loc"])
        raise ApiError(422, _explain(first["type"], param, first["msg"]), "invalid_request", param) from error
    if request.model != model_name:
        raise unknown_model(request.model, model_name)
    if request.stream_options is not None and not request.stream:
        raise ApiError(422, "stream_options are for streams; set stream", "invalid_request", "stream_options")
    _check_image_places(request)
    return request


def read_sampling(request: ChatRequest, limits: Limits) -> Sampling:
    """How the answer is to be drawn; raises `ApiError` (422) for more than the limits allow."""
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise ApiError(
            422, "give max_tokens or max_completion_tokens, not both", "invalid_request", "max_completion_tokens"
        )
    limited_by = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
    asked: int | None = getattr(request, limited_by)
    if asked is not None and asked > limits.max_tokens:
        message = f"{limited_by} is {shown(str(asked))}, at most {limits.max_tokens} are allowed"
        raise ApiError(422, message, "max_tokens_too_large", limited_by)
    stops = request.stop or []
    if len(stops) > _MOST_STOPS or not all(stops):
        message = f"stop takes 1 to {_MOST_STOPS} texts that are not empty, got {shown(repr(stops[: _MOST_STOPS + 1]))}"
        raise ApiError(422, message, "invalid_request", "stop")
    longest = max(map(len, stops), default=0)
    if longest > MAX_STOP_LENGTH:
        message = f"a stop text has {longest} characters, at most {MAX_STOP_LENGTH} are allowed"
        raise ApiError(422, message, "invalid_request", "stop")
    return Sampling(
        max_tokens=asked or min(limits.default_max_tokens, limits.max_tokens),
        temperature=request.temperature or 0.0,
        top_p=1.0 if request.top_p is None else request.top_p,
        stop=tuple(stops),
        seed=request.seed,
        deadline_s=limits.deadline_s,
        shrinks=asked is None,  # who has not asked for a length has not asked for too much
    )


def read_messages(
    request: ChatRequest, limits: Limits, low_side: int | None, fetched: Mapping[str, bytes]
) -> tuple[list[dict[str, str]], Any]:
    """Plain messages, and the image (PIL, RGB) or None.

    Args:
        request: as parsed.
        limits: how large an image may be.
        low_side: the shorter side in pixels down to which "low" brings an image; None: it changes nothing.
        fetched: the bytes of each of the request's `image_addresses`.

    Raises:
        ApiError: 422 for an image that cannot be used, or messages that are no conversation.
    """
    try:
        return read_conversation([_decode(message, limits, low_side, fetched) for message in request.messages])
    except (ConversationError, ImageError) as error:
        raise ApiError(422, error.detail, error.reason, "messages") from error


def _field(loc: tuple[int | str, ...]) -> str | None:
    """Where a fault lies, as a client would write it: `messages.0.content.1.image_url.url`; None: nowhere in it."""
    place = [part for part in loc if part not in (_TEXT, _PARTS)]
    del place[4:5]  # messages, 0, content, 1: then comes the type of the part, which chose how to read it
    return ".".join(shown(str(part)) for part in place) or None


def _explain(kind: str, param: str | None, message: str) -> str:
    if kind in ("extra_forbidden", "unsupported"):
        return f"the field {param!r} is not supported"
    return f"{param}: {shown(message)}" if param else shown(message)


def _check_image_places(request: ChatRequest) -> None:
    """A misplaced image is refused while it is still encoded, so that it costs nothing."""
    seen = 0
    for index, message in enumerate(request.messages):
        for part in message.content if isinstance(message.content, list) else []:
            if isinstance(part, TextPart):
                continue
            seen += 1
            if index > 0 or message.role != "user" or seen > 1:
                where = f"message {index} ({message.role})"
                raise ApiError(
                    422, f"{where}: one image at most, in the first user message", "image_misplaced", "messages"
                )


def _decode(message: ChatMessage, limits: Limits, low_side: int | None, fetched: Mapping[str, bytes]) -> dict[str, Any]:
    if isinstance(message.content, str):
        return message.model_dump()
    parts: list[dict[str, Any]] = []
    for part in message.content:
        if isinstance(part, TextPart):
            parts.append(part.model_dump())
            continue
        url = part.image_url.url
        image = decode_image(fetched[url] if url in fetched else read_data_uri(url), max_pixels=limits.max_image_pixels)
        if part.image_url.detail == "low" and low_side is not None:
            # The shorter side: the first tile is as wide as it is high, whatever the picture is.
            scale = low_side / min(image.size)
            image.thumbnail((image.width * scale, image.height * scale))
        parts.append({"type": "image", "image": image})
    return {"role": message.role, "content": parts}
