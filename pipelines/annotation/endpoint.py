"""Asking a running service that speaks the OpenAI API, such as `jobs/serve.py`, in place of an engine of our own."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from openai import APIConnectionError, APIStatusError, NotFoundError, OpenAI, OpenAIError, PermissionDeniedError
from PIL import Image

from flashsloth.image_processing_flashsloth import ImageError
from pipelines.annotation.answering import Question
from pipelines.annotation.parts import Answered
from pipelines.annotation.settings import EndpointSettings
from pipelines.serving.completions import fingerprint

_AHEAD = 2  # questions in hand per request under way
_HASH = "@sha256:"  # between a model's name and its hash
_NO_ROUTE = "/-/routes"  # what Ray Serve names in its 404 while a service starts or has stopped
_LONGEST_PAUSE_S = 8.0
_OUR_FAULT = (400, 413, 422)  # what the service says of a request that no repetition would mend


Found = TypeVar("Found")


class EndpointError(ValueError):
    """The service does not answer, or not to us; the message names it."""


class EndpointAsker:
    """Sends each question as a request, many at a time.

    Args:
        settings: the service.
        model: there, as `served_model` says.
        token: for its bearer header.
    """

    def __init__(self, settings: EndpointSettings, model: str, token: str) -> None:
        self.settings = settings
        self.model, _, self.model_hash = model.partition(_HASH)
        self._client = _client(settings, token)
        self._threads = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="endpoint")
        self._room = threading.Semaphore(_AHEAD * settings.concurrency)

    def prepare(self, question: Question) -> dict[str, Any] | Answered:
        """The body of the request. The image is looked at here too: what is none has no request to cost."""
        try:
            picture = question.picture()
        except ImageError as error:
            return Answered.failed(str(error))
        messages: list[dict[str, Any]] = [dict(message) for message in question.messages]
        if picture is not None and question.image is not None:
            image = {"type": "image_url", "image_url": {"url": _data_uri(question.image, picture)}}
            first = next(message for message in messages if message["role"] == "user")
            first["content"] = [image, {"type": "text", "text": first["content"]}]
        sampling = question.sampling
        body: dict[str, Any] = {"model": self.model, "messages": messages, "max_tokens": sampling.max_tokens}
        body |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed}
        return body | ({"stop": list(sampling.stop)} if sampling.stop else {})

    def ask(self, prompt: dict[str, Any]) -> Future[Answered]:
        """Send the request as soon as a thread is free."""
        self._room.acquire()
        future = self._threads.submit(self._send, prompt)
        future.add_done_callback(lambda _: self._room.release())
        return future

    def close(self) -> None:
        """Send nothing more."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _send(self, body: dict[str, Any]) -> Answered:
        try:
            completion = _once_routed(self.settings, lambda: self._client.chat.completions.create(**body))
        except APIStatusError as error:
            if error.status_code in _OUR_FAULT:
                return Answered.failed(f"{error.code or 'refused'}: {_message(error)}")
            if error.status_code == 500 and self._answers_others():
                return Answered.failed(f"engine_error: the service answers 500: {_message(error)}")
            raise EndpointError(f"{self.settings.url}: answers {error.status_code}: {_message(error)}") from error
        except OpenAIError as error:
            raise EndpointError(f"{self.settings.url}: {_cause(error)}") from error
        self._check_same_model(completion.system_fingerprint)
        choice, usage = completion.choices[0], completion.usage
        spent, given = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        if choice.message.content is None or choice.finish_reason not in ("stop", "length"):
            return Answered.failed(f"no_answer: the service ended with {choice.finish_reason!r}", spent)
        # Our service refuses what could not reach max_tokens. Others end where their context is full: that is no fault.
        if choice.finish_reason == "length" and given < body["max_tokens"] and self.model_hash:
            ended = f"the service's time was over after {given} of {body['max_tokens']} tokens"
            return Answered.failed(f"deadline: {ended}; raise its limits.deadline_s, or lower max_tokens", spent)
        return Answered(choice.message.content, choice.finish_reason, spent, given)

    def _check_same_model(self, found: str | None) -> None:
        """Make sure that who answers is who the run began with, where the service tells both."""
        if self.model_hash and found not in (None, expected := fingerprint(self.model_hash)):
            raise EndpointError(
                f"{self.settings.url}: {self.model} is another model now: its answers bear {found}, and this run began "
                f"with {expected}; serve that one again, or write to another output"
            )

    def _answers_others(self) -> bool:
        """Whether the service answers another question: then it is the row at which it fails."""
        messages: Any = [{"role": "user", "content": "Hi"}]
        try:
            self._client.chat.completions.create(model=self.model, messages=messages, max_tokens=1)
        except OpenAIError:
            return False
        return True


def served_model(settings: EndpointSettings, token: str) -> str:
    """The model that the settings name, or else the only one that the service lists: `NAME`, or `NAME@sha256:HASH`.

    The hash tells a model from others of its name. Our service lists it, others hardly do.

    Raises:
        EndpointError: nobody answers, or the settings name none and the service lists several.
    """
    try:
        with _client(settings, token) as client:
            models = _once_routed(settings, lambda: list(client.models.list()))
        hashes = {model.id: (model.model_extra or {}).get("hash") for model in models}
    except OpenAIError as error:
        if settings.model and isinstance(error, NotFoundError | PermissionDeniedError) and not _is_unrouted(error):
            return settings.model  # there is no list, or none for us, which a service may do without
        raise EndpointError(f"{settings.url}: {_cause(error)}") from error
    if settings.model is None and len(hashes) != 1:
        raise EndpointError(f"{settings.url}: serves {', '.join(hashes) or 'no model'}; choose one: endpoint.model")
    name = settings.model or next(iter(hashes))
    return f"{name}{_HASH}{hashes[name]}" if hashes.get(name) else name


def _once_routed(settings: EndpointSettings, ask: Callable[[], Found]) -> Found:
    """What `ask` gives; asked again, as where a service is busy, while Serve's proxy knows of no service behind it."""
    attempt = 0
    while True:
        try:
            return ask()
        except NotFoundError as error:
            if not _is_unrouted(error) or attempt == settings.max_retries:
                raise
        time.sleep(min(0.5 * 2**attempt, _LONGEST_PAUSE_S))
        attempt += 1


def _is_unrouted(error: OpenAIError) -> bool:
    return isinstance(error, NotFoundError) and _NO_ROUTE in str(error.body)


def _client(settings: EndpointSettings, token: str) -> OpenAI:
    return OpenAI(base_url=settings.url, api_key=token, timeout=settings.timeout_s, max_retries=settings.max_retries)


def _data_uri(data: bytes, picture: Image.Image) -> str:
    """The image as received where its format is one that every service takes, else as PNG."""
    with Image.open(io.BytesIO(data)) as header:
        kind = header.format
    if kind not in ("JPEG", "PNG", "WEBP"):
        file = io.BytesIO()
        picture.save(file, "PNG")
        kind, data = "PNG", file.getvalue()
    return f"data:{Image.MIME[kind]};base64,{base64.b64encode(data).decode('ascii')}"


def _message(error: APIStatusError) -> str:
    body = error.body if isinstance(error.body, dict) else {}
    return str(body.get("message") or error.message).splitlines()[0]


def _cause(error: OpenAIError) -> str:
    if isinstance(error, APIConnectionError):
        return f"no answer ({error.__cause__ or error})"
    return str(error).splitlines()[0]
