"""Asking a running service that speaks the OpenAI API, such as `jobs/serve.py`, in place of an engine of our own."""

from __future__ import annotations

import base64
import io
import json
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from openai import (
    APIConnectionError,
    APIStatusError,
    NotFoundError,
    OpenAI,
    OpenAIError,
    PermissionDeniedError,
    RateLimitError,
)
from PIL import Image

from flashsloth.image_processing_flashsloth import ImageError
from pipelines.annotation.answering import Question
from pipelines.annotation.parts import Answered
from pipelines.annotation.replies import Completion, ModelList, NoReplyError, read_reply
from pipelines.annotation.settings import EndpointSettings
from pipelines.records import shortened
from pipelines.serving.completions import fingerprint

_AHEAD = 2  # questions in hand per request under way
_HASH = "@sha256:"  # between a model's name and its hash
_NO_ROUTE = "/-/routes"  # what Ray Serve names in its 404 while a service starts or has stopped
_LONGEST_PAUSE_S = 8.0  # but for a service that tells a longer one, up to
_LONGEST_TOLD_PAUSE_S = 60.0
_BUSY = (408, 409, 429)  # as from 500 on: the same request may be answered later
_OUR_FAULT = (400, 413, 422)  # what the service says of a request that no repetition would mend
_OF_ALL_ROWS = ("max_tokens", "temperature", "top_p", "stop", "seed")  # fields that come from the settings
_REMEDIES = {
    401: "; set OPENAI_API_KEY to a token of this service",
    404: "; endpoint.url is the base of the API, such as http://127.0.0.1:8000/v1",
    429: "; lower endpoint.concurrency, or raise what the service allows",
}


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
        self._answered_at = -1.0  # by the monotonic clock, when the last answer came

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
            completion = self._until_answered(lambda: self._complete(**body))
        except APIStatusError as error:
            field = str(error.param).partition(".")[0]
            # Each row would be refused for it; of another service's refusal nobody knows what it depends on.
            if self.model_hash and error.status_code in _OUR_FAULT and field in _OF_ALL_ROWS:
                raise EndpointError(f"{self.settings.url}: refuses {field}: {_message(error)}") from error
            if error.status_code in _OUR_FAULT:
                return Answered.failed(f"{error.code or 'refused'}: {_message(error)}")
            if error.status_code == 500 and self._answers_others():
                return Answered.failed(f"engine_error: the service answers 500: {_message(error)}")
            raise _failure(self.settings, error) from error
        except NoReplyError as error:
            found = f"the service answers what is no completion: {error}"
            if self._answers_others():
                return Answered.failed(f"no_answer: {found}")
            raise EndpointError(f"{self.settings.url}: {found}") from error
        except OpenAIError as error:
            raise _failure(self.settings, error) from error
        self._answered_at = time.monotonic()
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

    def _complete(self, **body: Any) -> Completion:
        return read_reply(Completion, self._client.chat.completions.with_raw_response.create(**body).content)

    def _check_same_model(self, found: str | None) -> None:
        """Make sure that who answers is who the run began with, where the service tells both."""
        if self.model_hash and found not in (None, expected := fingerprint(self.model_hash)):
            raise EndpointError(
                f"{self.settings.url}: {self.model} is another model now: its answers bear {found}, and this run began "
                f"with {expected}; serve that one again, or write to another output"
            )

    def _until_answered(self, ask: Callable[[], Found]) -> Found:
        """As `_patiently`; where the service is busy, for as long as others of our requests are answered."""
        while True:
            began = time.monotonic()
            try:
                return _patiently(self.settings, ask)
            except RateLimitError:
                if self._answered_at < began:
                    raise

    def _answers_others(self) -> bool:
        """Whether the service answers another question: then it is the row at which it fails."""
        messages: Any = [{"role": "user", "content": "Hi"}]
        try:
            self._until_answered(lambda: self._complete(model=self.model, messages=messages, max_tokens=1))
        except (OpenAIError, NoReplyError):
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
            models = read_reply(ModelList, _patiently(settings, client.models.with_raw_response.list).content)
        hashes = {model.id: model.hash for model in models.data}
    except NoReplyError as error:
        raise EndpointError(f"{settings.url}: answers what is no list of models: {error}{_REMEDIES[404]}") from error
    except OpenAIError as error:
        if settings.model and isinstance(error, NotFoundError | PermissionDeniedError) and not _is_unrouted(error):
            return settings.model  # there is no list, or none for us, which a service may do without
        raise _failure(settings, error) from error
    if settings.model is None and len(hashes) != 1:
        raise EndpointError(f"{settings.url}: serves {', '.join(hashes) or 'no model'}; choose one: endpoint.model")
    name = settings.model or next(iter(hashes))
    if name not in hashes and any(hashes.values()):  # our service lists all that it has
        raise EndpointError(f"{settings.url}: serves {', '.join(hashes)}, not {name}: endpoint.model")
    return f"{name}{_HASH}{hashes[name]}" if hashes.get(name) else name


def _patiently(settings: EndpointSettings, ask: Callable[[], Found]) -> Found:
    """What `ask` gives; asked again, with growing pauses, while the service is busy or away."""
    attempt = 0
    while True:
        try:
            return ask()
        except OpenAIError as error:
            if attempt == settings.max_retries or not _may_pass(error):
                raise
            # A service tells when it may have room for one. Not when it will be there again, or have room for all.
            pause_s = max(_told_pause(error), min(0.5 * 2**attempt, _LONGEST_PAUSE_S))
        time.sleep(pause_s * random.uniform(1, 1.25))  # not all at the same time
        attempt += 1


def _may_pass(error: OpenAIError) -> bool:
    if isinstance(error, APIStatusError):
        return error.status_code in _BUSY or error.status_code >= 500 or _is_unrouted(error)
    return isinstance(error, APIConnectionError)


def _told_pause(error: OpenAIError) -> float:
    text = error.response.headers.get("retry-after", "") if isinstance(error, APIStatusError) else ""
    return min(float(text), _LONGEST_TOLD_PAUSE_S) if text.isdecimal() else 0.0


def _is_unrouted(error: OpenAIError) -> bool:
    """Whether Serve's proxy knows of no service behind it: it has stopped, or it starts."""
    return isinstance(error, NotFoundError) and _NO_ROUTE in str(error.body)


def _client(settings: EndpointSettings, token: str) -> OpenAI:
    return OpenAI(base_url=settings.url, api_key=token, timeout=settings.timeout_s, max_retries=0)  # see _patiently


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
    """What the service says: OpenAI's services and ours in a `message`, others in a `detail` or just so."""
    body = error.body
    if isinstance(body, dict):
        body = body.get("message") or body.get("detail") or body
    said = body if isinstance(body, str) else json.dumps(body)
    return shortened(" ".join(said.split())) or error.message


def _failure(settings: EndpointSettings, error: OpenAIError) -> EndpointError:
    """What went wrong, and what helps."""
    if isinstance(error, APIConnectionError):
        return EndpointError(f"{settings.url}: no answer ({error.__cause__ or error})")
    if not isinstance(error, APIStatusError):
        return EndpointError(f"{settings.url}: {str(error).splitlines()[0]}")
    says_itself = _is_unrouted(error) or error.code == "model_not_found"
    remedy = "" if says_itself else _REMEDIES.get(error.status_code, "")
    return EndpointError(f"{settings.url}: answers {error.status_code}: {_message(error)}{remedy}")
