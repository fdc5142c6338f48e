"""Every request that is wrong gets a clear refusal, in OpenAI's shape, before the model sees it."""

from __future__ import annotations

import asyncio
import gzip
import json
from typing import Any

import pytest
from pydantic import ValidationError
from starlette.testclient import TestClient

from pipelines.serving.authentication import hash_token
from pipelines.serving.errors import ApiError
from pipelines.serving.http import build_http
from pipelines.serving.protocol import ChatRequest
from pipelines.serving.service import Service
from pipelines.serving.settings import Policy
from tests.serving_http import LIMITS, Backend, body, data_uri, post, user, with_image

REFUSED = {
    "stream options": ({"stream_options": {"include_usage": True}}, "stream_options", "set stream"),
    "unknown stream options": ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "not supported"),
    "several answers": ({"n": 2}, "n", ""),
    "tools": ({"tools": [{"type": "function"}]}, "tools", "the field 'tools' is not supported"),
    "log probabilities": ({"logprobs": True}, "logprobs", "the field 'logprobs' is not supported"),
    "likely tokens": ({"top_logprobs": 5}, "top_logprobs", "the field 'top_logprobs' is not supported"),
    "a biased answer": ({"logit_bias": {"50256": -100}}, "logit_bias", "the field 'logit_bias' is not supported"),
    "a tool": ({"tool_choice": "required"}, "tool_choice", "the field 'tool_choice' is not supported"),
    "json": ({"response_format": {"type": "json_object"}}, "response_format", "'response_format' is not supported"),
    "speech": ({"modalities": ["text", "audio"]}, "modalities", "the field 'modalities' is not supported"),
    "a copy": ({"store": True}, "store", "the field 'store' is not supported"),
    "presence": ({"presence_penalty": 0.5}, "presence_penalty", "the field 'presence_penalty' is not supported"),
    "frequency": ({"frequency_penalty": -1}, "frequency_penalty", "the field 'frequency_penalty' is not supported"),
    "a penalty that is true": ({"presence_penalty": False}, "presence_penalty", "a number is expected"),
    "an unknown field": ({"best_of": 1}, "best_of", "the field 'best_of' is not supported"),
    "no messages": ({"messages": []}, "messages", ""),
    "temperature": ({"temperature": -1}, "temperature", ""),
    "top_p": ({"top_p": 0}, "top_p", ""),
    "too many tokens": ({"max_tokens": 33}, "max_tokens", "max_tokens is 33, at most 32 are allowed"),
    "too many tokens by their new name": (
        {"max_completion_tokens": 33},
        "max_completion_tokens",
        "max_completion_tokens is 33, at most 32 are allowed",
    ),
    "a length in quotes": ({"max_tokens": "5"}, "max_tokens", "a number is expected"),
    "a length that is true": ({"max_tokens": True}, "max_tokens", "a number is expected"),
    "a truth that is 1": ({"stream": 1}, "stream", "true or false is expected"),
    "both lengths": ({"max_tokens": 3, "max_completion_tokens": 3}, "max_completion_tokens", "not both"),
    "empty stop": ({"stop": ""}, "stop", ""),
    "five stops": ({"stop": list("abcde")}, "stop", ""),
    "a long stop": ({"stop": ["x" * 257]}, "stop", "257 characters, at most 256 are allowed"),
    "much metadata": ({"metadata": {str(i): "x" for i in range(17)}}, "metadata", "at most 16 entries"),
    "a function": ({"functions": [{"name": "f"}]}, "functions", "the field 'functions' is not supported"),
    "effort": ({"reasoning_effort": "high"}, "reasoning_effort", "the field 'reasoning_effort' is not supported"),
    "unknown role": ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", ""),
    "system": ({"messages": [{"role": "system", "content": "x"}, user()]}, "messages", "not 'user'"),
    "developer": (
        {"messages": [{"role": "developer", "content": "x"}, user()]},
        "messages",
        "say it in the first question",
    ),
    "stuffed stream": (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
        "the field 'stream_options.include_obfuscation' is not supported",
    ),
    "answer last": ({"messages": [user(), {"role": "assistant", "content": "x"}]}, "messages", "not a question"),
    "empty question": ({"messages": [user(" ")]}, "messages", "no text"),
    "long question": ({"messages": [user("many words " * 100)]}, "messages", "at most 160"),
    "audio": ({"messages": [user([{"type": "input_audio", "input_audio": {}}])]}, "messages.0.content.0", "'text'"),
    "no content": ({"messages": [user(None)]}, "messages.0.content", "a text, or a list of parts, is expected"),
    "text in a list": ({"messages": [user(["x"])]}, "messages.0.content.0", "should be an object"),
    "part without text": (
        {"messages": [user([{"type": "text", "txt": "x"}])]},
        "messages.0.content.0.text",
        "required",
    ),
    "bare address": (
        {"messages": [user([{"type": "image_url", "image_url": "x"}])]},
        "messages.0.content.0.image_url",
        "should be an object",
    ),
    "finer detail": (
        {"messages": [user([{"type": "image_url", "image_url": {"url": "x", "detail": "max"}}])]},
        "messages.0.content.0.image_url.detail",
        "'auto', 'low', 'high' or 'original'",
    ),
    "tool calls": (
        {"messages": [user(), {"role": "assistant", "content": "x", "tool_calls": [{}]}, user()]},
        "messages.1.tool_calls",
        "the field 'messages.1.tool_calls' is not supported",
    ),
    "stop as a number": ({"stop": 5}, "stop", "stop: "),
    "a number to stop at": ({"stop": ["a", 1]}, "stop.1", "valid string"),
    "another tier": ({"service_tier": "flex"}, "service_tier", "the field 'service_tier' is not supported"),
    "two images": (
        {"messages": [user([*with_image(data_uri()), *with_image(data_uri())])]},
        "messages",
        "one image at most",
    ),
    "late image": (
        {"messages": [user(), {"role": "assistant", "content": "x"}, user(with_image(data_uri()))]},
        "messages",
        "in the first user message",
    ),
    "web image": ({"messages": [user(with_image("https://a.example/x.png"))]}, "messages", "not fetched"),
    "metadata service": ({"messages": [user(with_image("http://169.254.169.254/"))]}, "messages", "not fetched"),
    "bare base64": (
        {"messages": [user(with_image(data_uri().partition(",")[2]))]},
        "messages",
        "image_url is no address; send a data URI, as data:image/png;base64,...",
    ),
    "file": ({"messages": [user(with_image("file:///etc/passwd"))]}, "messages", "not fetched"),
    "no base64": ({"messages": [user(with_image("data:image/png;base64,@@@"))]}, "messages", "not base64"),
    "no ASCII": ({"messages": [user(with_image("data:image/png;base64,é"))]}, "messages", "not base64"),
    "plain data": ({"messages": [user(with_image("data:image/png,abc"))]}, "messages", "a data URI must be base64"),
    "empty image": ({"messages": [user(with_image("data:image/png;base64,"))]}, "messages", "0 bytes"),
    "no image": ({"messages": [user(with_image("data:image/png;base64,AAAA"))]}, "messages", ""),
    "cut image": ({"messages": [user(with_image(data_uri(kind="JPEG")[:900]))]}, "messages", ""),
    "format": ({"messages": [user(with_image(data_uri(kind="GIF")))]}, "messages", "GIF"),
    "pixels": ({"messages": [user(with_image(data_uri(101, 100)))]}, "messages", "at most 10000"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_answered_is_refused_before_the_model(name: str, client: TestClient, backend: Backend) -> None:
    changes, param, message = REFUSED[name]
    response = post(client, **changes)
    assert response.status_code == 422, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["code"]
    assert error["param"] == param or (error["param"].startswith(param) and param in ("messages", "stream_options"))
    assert message in error["message"]
    assert not backend.prompts


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"model": "tiny"}', b"\xff\xfe", b'{"model": 1, "messages": 2}'])
def test_a_broken_body_is_refused(text: bytes, client: TestClient, backend: Backend) -> None:
    response = client.post("/v1/chat/completions", content=text)
    assert response.status_code == 422
    assert response.json()["error"]["code"] == "invalid_request"
    assert not backend.prompts


def test_a_refusal_repeats_little_of_what_was_sent(client: TestClient) -> None:
    long = "x" * 20_000
    for changes in (
        {"model": long},
        {"stop": ["x" * 5000] * 5},
        {long: 1},
        {"metadata": {long: 1}},
        {"max_tokens": 10**4000},
        {"messages": [user([{"type": long}])]},
        {"messages": [user([{"type": "text", "text": "x", long: 1}])]},
        {"messages": [user(with_image(f"{long}:x"))]},
        {"messages": [user(with_image(f"data:{long}"))]},
    ):
        response = post(client, **changes)
        assert 400 < response.status_code < 500 and len(response.text) < 1000, response.text
    assert len(client.get(f"/{long}").text) < 1000
    assert "'text', 'image_url'" in post(client, messages=[user([{"type": long}])]).json()["error"]["message"]


def test_the_first_of_many_faults_ends_the_reading() -> None:
    """Each would be an object with a place and a message, 600 bytes for two that were sent."""
    many = [0] * 10_000
    for changes in (
        {"messages": many},
        {"messages": [user(many)]},
        {"messages": [user()] * 5000},
        {"messages": [{**user(), **{str(name): 1 for name in many}}]},
        {"stop": many},
        {"metadata": {str(number): number for number in range(10_000)}},
        {str(number): number for number in range(10_000)},
    ):
        with pytest.raises(ValidationError) as caught:
            ChatRequest.model_validate_json(json.dumps(body(**changes)))
        assert caught.value.error_count() == 1


def test_a_body_that_does_not_come_is_not_waited_for(service: Service) -> None:
    sent: list[Any] = []
    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}])

    async def receive() -> Any:
        for message in messages:
            return message
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        sent.append(message)

    service.adopt(Policy(limits=LIMITS.model_copy(update={"deadline_s": 0.05})))
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": []}
    asyncio.run(build_http(service)(scope, receive, send))
    assert sent[0]["status"] == 408 and service._num_open == 0
    assert json.loads(sent[1]["body"])["error"]["code"] == "body_too_slow"


def test_a_compressed_body_is_named_as_one(client: TestClient, backend: Backend) -> None:
    sent = {"content": gzip.compress(json.dumps(body()).encode()), "headers": {"content-encoding": "gzip"}}
    response = client.post("/v1/chat/completions", **sent)
    assert response.status_code == 415
    assert "compressed (gzip)" in response.json()["error"]["message"]
    assert not backend.prompts


def test_nobody_keeps_a_slot_after_he_has_gone(client: TestClient, service: Service, backend: Backend) -> None:
    response = client.post("/v1/chat/completions", json=body(), headers={"X-Request-Disconnect-Disabled": "?1"})
    assert (response.status_code, response.json()["error"]["code"]) == (422, "invalid_request")
    assert "x-request-disconnect-disabled is not supported" in response.json()["error"]["message"]
    assert not backend.prompts and service._num_open == 0


def test_a_large_body_is_refused_with_and_without_its_length(client: TestClient, backend: Backend) -> None:
    large = json.dumps(body(user="x" * LIMITS.max_body_bytes)).encode()
    sent_as_stream = (large[i : i + 1000] for i in range(0, len(large), 1000))
    for content in (large, sent_as_stream):
        response = client.post("/v1/chat/completions", content=content)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"
    assert not backend.prompts


def test_a_client_that_leaves_while_it_sends_its_body_is_no_fault_of_ours(service: Service, client: TestClient) -> None:
    """Counted as one that went away; nothing is raised, of which Serve would log the trace."""
    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(messages)

    async def send(message: Any) -> None:
        pass

    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": []}
    asyncio.run(build_http(service)(scope, receive, send))
    assert service._num_open == 0
    assert 'flashsloth_requests_total{replica="ingress-1",status="499"} 1.0' in client.get("/metrics").text


def test_an_unknown_model_is_not_found(client: TestClient, backend: Backend) -> None:
    response = post(client, model="gpt-4o")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert "'tiny'" in response.json()["error"]["message"]
    assert not backend.prompts


def test_overload_says_when_to_come_back(client: TestClient, backend: Backend) -> None:
    backend.error = ApiError(429, "too many requests are waiting; try again", "overloaded")
    response = post(client)
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert response.json()["error"]["type"] == "rate_limit_error"


def test_a_fault_of_ours_shows_nothing_of_its_inside(client: TestClient, backend: Backend) -> None:
    backend.error = RuntimeError("secret path /home/x")
    response = post(client)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in response.text


def test_tokens_are_asked_for_everywhere_but_at_the_health_and_the_page(client: TestClient, service: Service) -> None:
    service.adopt(Policy(limits=LIMITS, tokens={"reader": hash_token("right"), "other": hash_token("also")}))
    for sent, code in ((None, "missing_token"), ("wrong", "invalid_token"), ("", "missing_token")):
        headers = {} if sent is None else {"authorization": f"Bearer {sent}"}
        answers = [client.get(path, headers=headers) for path in ("/v1/models", "/v1/models/tiny", "/metrics")]
        answers.append(client.post("/v1/chat/completions", json=body(), headers=headers))
        for answer in answers:
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, code)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert client.get("/health").status_code == client.get("/").status_code == 200
    for token in ("right", "also"):
        assert client.get("/v1/models", headers={"authorization": f"Bearer {token}"}).status_code == 200


def test_a_client_that_asks_too_often_is_told_when_to_come_back(client: TestClient, service: Service) -> None:
    service.adopt(Policy(limits=LIMITS.model_copy(update={"requests_per_minute": 2})))
    answers = [post(client) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[-1].json()["error"]["code"] == "rate_limited"
    assert 0 < int(answers[-1].headers["retry-after"]) <= 30
    service.adopt(Policy(limits=service.limits.model_copy(update={"max_tokens": 7})))
    assert post(client).status_code == 429, "another limit has changed, not what was asked"


def test_who_is_turned_away_at_the_door_is_counted(client: TestClient, service: Service) -> None:
    service.adopt(Policy(limits=LIMITS.model_copy(update={"requests_per_minute": 1})))
    assert [post(client).status_code for _ in range(3)] == [200, 429, 429]
    service.adopt(Policy(limits=LIMITS, tokens={"reader": hash_token("right")}))
    assert post(client).status_code == 401
    text = client.get("/metrics", headers={"authorization": "Bearer right"}).text
    for status, count in ((200, 1), (429, 2), (401, 1)):
        assert f'flashsloth_requests_total{{replica="ingress-1",status="{status}"}} {count}.0' in text


def test_more_open_requests_than_allowed_are_turned_away_unread(
    client: TestClient, service: Service, backend: Backend
) -> None:
    service.adopt(Policy(limits=LIMITS.model_copy(update={"max_open_requests": 1})))
    service._num_open = 1
    response = client.post("/v1/chat/completions", content=b"never read")
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    service._num_open = 0
    assert post(client).status_code == 200


def test_the_policy_can_change_between_two_requests(client: TestClient, service: Service) -> None:
    assert post(client, max_tokens=8).status_code == 200
    changed = service.policy.changed({"limits": {"max_tokens": 7}})
    assert changed.limits == LIMITS.model_copy(update={"max_tokens": 7})
    service.adopt(changed)
    assert post(client, max_tokens=8).json()["error"]["code"] == "max_tokens_too_large"
    with pytest.raises(ValidationError, match="max_token"):
        service.policy.changed({"limits": {"max_token": 7}})
