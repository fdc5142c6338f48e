"""Every request that is wrong gets a clear refusal, in OpenAI's shape, before the model sees it."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from pydantic import ValidationError
from starlette.testclient import TestClient

from pipelines.serving.authentication import hash_token
from pipelines.serving.engine import Encoder, Engine, EngineSettings, Prompt
from pipelines.serving.errors import ApiError
from pipelines.serving.http import build_http
from pipelines.serving.metrics import EngineMetrics, IngressMetrics, exposition
from pipelines.serving.replies import Desk, Reply
from pipelines.serving.service import Service
from pipelines.serving.settings import Limits, Policy
from tests.fixtures.tiny import build_processor, build_tiny_model

LIMITS = Limits(
    max_body_bytes=60_000, max_image_pixels=10_000, max_prompt_tokens=160, max_tokens=32, default_max_tokens=6
)


class Backend:
    """An engine in this process, which remembers what it was given."""

    def __init__(self) -> None:
        processor = build_processor()
        self.engine = Engine(build_tiny_model(processor), processor, EngineSettings(max_slots=4))
        self.desk = Desk(self.engine)
        self.prompts: list[Prompt] = []
        self.error: Exception | None = None
        self.breaks_after: int | None = None

    async def answer(self, prompt: Prompt) -> Reply:
        self.prompts.append(prompt)
        if self.error:
            raise self.error
        reply = await self.desk.answer(prompt)
        if isinstance(reply, ApiError):
            raise reply
        return reply

    async def stream(self, prompt: Prompt) -> AsyncIterator[Reply]:
        self.prompts.append(prompt)
        pieces = 0
        async for reply in self.desk.stream(prompt):
            if self.error and pieces == (self.breaks_after or 0):
                raise self.error
            if isinstance(reply, ApiError):
                raise reply
            pieces += 1
            yield reply

    async def check(self) -> None:
        if self.error:
            raise self.error
        self.engine.check()


@pytest.fixture(scope="module")
def shared_backend() -> Iterator[Backend]:
    backend = Backend()
    yield backend
    backend.engine.close()


@pytest.fixture
def backend(shared_backend: Backend) -> Backend:
    shared_backend.prompts, shared_backend.error, shared_backend.breaks_after = [], None, None
    return shared_backend


@pytest.fixture
def service(backend: Backend) -> Service:
    metrics = IngressMetrics("ingress-1")
    engine_metrics = EngineMetrics("engine-1")

    async def read_metrics() -> bytes:
        return exposition([metrics.collect(), engine_metrics.collect(backend.engine.stats())])

    encoder = Encoder(backend.engine.processor)
    return Service("tiny", encoder, backend, metrics, Policy(limits=LIMITS), read_metrics)


@pytest.fixture
def client(service: Service) -> Iterator[TestClient]:
    with TestClient(build_http(service), raise_server_exceptions=False) as client:
        yield client


def data_uri(width: int = 40, height: int = 30, kind: str = "PNG") -> str:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def with_image(url: str, text: str = "What color is it?") -> list[dict[str, Any]]:
    return [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]


def user(content: Any = "What color is it?") -> dict[str, Any]:
    return {"role": "user", "content": content}


def body(**changes: Any) -> dict[str, Any]:
    return {"model": "tiny", "messages": [user(with_image(data_uri()))], **changes}


def post(client: TestClient, **changes: Any) -> Any:
    return client.post("/v1/chat/completions", json=body(**changes))


def test_an_answer_has_the_shape_of_a_completion(client: TestClient, backend: Backend) -> None:
    response = client.post("/v1/chat/completions", json=body(max_tokens=4), headers={"x-request-id": "mine-1"})
    assert response.status_code == 200, response.text
    answer = response.json()
    (prompt,) = backend.prompts
    (expected,) = backend.engine.generate([prompt])
    assert answer["id"] == "chatcmpl-mine-1"
    assert (answer["object"], answer["model"]) == ("chat.completion", "tiny")
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text}
    assert choice["finish_reason"] == expected.finish_reason
    assert answer["usage"] == {
        "prompt_tokens": len(prompt.input_ids),
        "completion_tokens": len(expected.token_ids),
        "total_tokens": len(prompt.input_ids) + len(expected.token_ids),
    }


def test_image_and_question_reach_the_engine_as_the_processor_makes_them(client: TestClient, backend: Backend) -> None:
    uri = data_uri()
    assert post(client, messages=[user(with_image(uri))]).status_code == 200
    processor = backend.engine.processor
    picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    expected = processor.encode([user()], has_image=True)
    (prompt,) = backend.prompts
    assert (prompt.input_ids, prompt.question_ids) == (expected["input_ids"], expected["question_ids"])
    np.testing.assert_array_equal(prompt.pixel_values, processor.image_processor.to_uint8(picture))


def test_text_alone_and_several_turns(client: TestClient, backend: Backend) -> None:
    turns = [user("Is it red?"), {"role": "assistant", "content": "Yes."}, user([{"type": "text", "text": "Sure?"}])]
    assert post(client, messages=turns).status_code == 200
    assert backend.prompts[0].pixel_values is None
    assert max(backend.prompts[0].question_ids) == 2


def test_sampling_arrives(client: TestClient, backend: Backend) -> None:
    changes = {"max_completion_tokens": 3, "temperature": 0.7, "top_p": 0.5, "stop": ["x", "y"], "seed": 5, "n": 1}
    assert post(client, **changes).status_code == 200
    sampling = backend.prompts[0].sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (3, 0.7, 0.5)
    assert (sampling.stop, sampling.seed) == (("x", "y"), 5)


def test_an_answer_has_the_default_length_where_none_is_asked(client: TestClient, backend: Backend) -> None:
    assert post(client).status_code == 200
    assert backend.prompts[0].sampling.max_tokens == LIMITS.default_max_tokens


REFUSED = {
    "stream options": ({"stream_options": {"include_usage": True}}, "stream_options", "set stream"),
    "unknown stream options": ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "not supported"),
    "several answers": ({"n": 2}, "n", ""),
    "tools": ({"tools": []}, "tools", "the field 'tools' is not supported"),
    "no messages": ({"messages": []}, "messages", ""),
    "temperature": ({"temperature": -1}, "temperature", ""),
    "top_p": ({"top_p": 0}, "top_p", ""),
    "too many tokens": ({"max_tokens": 33}, "max_tokens", "max_tokens is 33, at most 32 are allowed"),
    "both lengths": ({"max_tokens": 3, "max_completion_tokens": 3}, "max_completion_tokens", "not both"),
    "empty stop": ({"stop": ""}, "stop", ""),
    "five stops": ({"stop": list("abcde")}, "stop", ""),
    "unknown role": ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role", ""),
    "system": ({"messages": [{"role": "system", "content": "x"}, user()]}, "messages", "not 'user'"),
    "answer last": ({"messages": [user(), {"role": "assistant", "content": "x"}]}, "messages", "not a question"),
    "empty question": ({"messages": [user(" ")]}, "messages", "no text"),
    "long question": ({"messages": [user("many words " * 100)]}, "messages", "at most 160"),
    "audio": ({"messages": [user([{"type": "input_audio", "input_audio": {}}])]}, "messages.0.content", ""),
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
    "file": ({"messages": [user(with_image("file:///etc/passwd"))]}, "messages", "not fetched"),
    "no base64": ({"messages": [user(with_image("data:image/png;base64,@@@"))]}, "messages", "no valid base64"),
    "plain data": ({"messages": [user(with_image("data:image/png,abc"))]}, "messages", "without base64"),
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
    assert error["param"].startswith(param)
    assert message in error["message"]
    assert not backend.prompts


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"model": "tiny"}', b"\xff\xfe", b'{"model": 1, "messages": 2}'])
def test_a_broken_body_is_refused(text: bytes, client: TestClient, backend: Backend) -> None:
    response = client.post("/v1/chat/completions", content=text)
    assert response.status_code == 422
    assert response.json()["error"]["code"] == "invalid_request"
    assert not backend.prompts


def test_a_large_body_is_refused_with_and_without_its_length(client: TestClient, backend: Backend) -> None:
    large = json.dumps(body(user="x" * LIMITS.max_body_bytes)).encode()
    sent_as_stream = (large[i : i + 1000] for i in range(0, len(large), 1000))
    for content in (large, sent_as_stream):
        response = client.post("/v1/chat/completions", content=content)
        assert response.status_code == 413
        assert response.json()["error"]["code"] == "body_too_large"
    assert not backend.prompts


def test_an_unknown_model_is_not_found(client: TestClient, backend: Backend) -> None:
    response = post(client, model="gpt-4o")
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert "'tiny'" in response.json()["error"]["message"]
    assert not backend.prompts


def test_models(client: TestClient) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert client.get("/v1/models/tiny").json() == model
    assert client.get("/v1/models/another").status_code == 404


def test_unknown_paths_and_methods_have_the_same_shape(client: TestClient) -> None:
    assert client.get("/v2").json()["error"]["message"] == "GET /v2: Not Found"
    assert client.get("/v1/chat/completions").status_code == 405


def stream(client: TestClient, **changes: Any) -> tuple[int, list[dict[str, Any]]]:
    """The status and the events of a stream; each ends in an empty line, the last one says that it is done."""
    response = post(client, stream=True, **changes)
    if response.headers["content-type"] != "text/event-stream; charset=utf-8":
        return response.status_code, [response.json()]
    events = response.text.split("\n\n")
    assert events.pop() == ""
    if events[-1] == "data: [DONE]":
        events.pop()
    return response.status_code, [json.loads(event.removeprefix("data: ")) for event in events]


def test_a_stream_adds_up_to_the_whole_answer(client: TestClient) -> None:
    whole = post(client, max_tokens=20).json()
    _, events = stream(client, max_tokens=20, stream_options={"include_usage": True})
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({(event["id"], event["created"], event["model"]) for event in events}) == 1
    *chunks, usage = events
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])


def test_a_stream_tells_its_usage_only_where_asked(client: TestClient) -> None:
    _, events = stream(client, max_tokens=3)
    assert all(event["choices"] and "usage" not in event for event in events)


def test_what_fails_before_the_first_text_has_its_own_status(client: TestClient, backend: Backend) -> None:
    backend.error = ApiError(429, "too many requests are waiting; try again", "overloaded")
    assert stream(client) == (429, [backend.error.body()])


def test_a_stream_that_breaks_says_so(client: TestClient, backend: Backend, service: Service) -> None:
    backend.error, backend.breaks_after = ApiError(503, "no engine can answer at the moment", "unavailable"), 1
    status, events = stream(client, max_tokens=32)
    assert (status, events[-1]) == (200, backend.error.body())
    assert service._num_open == 0
    deadline = time.monotonic() + 10
    while backend.engine.stats().running:  # the engine lets go of it at its next step
        assert time.monotonic() < deadline, "the slot is not freed"
        time.sleep(0.01)


def test_health_follows_the_engine(client: TestClient, backend: Backend) -> None:
    backend.error = RuntimeError("the model gives logits that are not finite")
    response = client.get("/health")
    backend.error = None
    assert client.get("/health").json() == {"status": "ok"}
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")


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


def test_an_answer_whose_time_is_over_is_cut(client: TestClient, service: Service, backend: Backend) -> None:
    service.adopt(Policy(limits=Limits(max_tokens=900, deadline_s=0.05)))
    response = post(client, max_tokens=900)
    if response.status_code == 200:  # a first token came in time
        assert response.json()["choices"][0]["finish_reason"] == "length"
        assert response.json()["usage"]["completion_tokens"] < 900
    else:
        assert (response.status_code, response.json()["error"]["code"]) == (503, "deadline")
        assert response.headers["retry-after"]


def test_the_metrics_count(client: TestClient) -> None:
    assert post(client, max_tokens=4).status_code == 200
    stream(client, max_tokens=4)
    assert post(client, n=2).status_code == 422
    families = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
    requests = {sample.labels["status"]: sample.value for sample in samples(families, "flashsloth_requests", "_total")}
    assert requests == {"200": 2, "422": 1}
    (first,) = samples(families, "flashsloth_time_to_first_token_seconds", "_count")
    assert (first.value, first.labels["replica"]) == (2, "ingress-1")
    tokens = {sample.labels["kind"]: sample.value for sample in samples(families, "flashsloth_tokens", "_total")}
    assert 0 < tokens["generated"] <= 8 < tokens["prompt"]
    for name in ("queue", "batch_size", "kv_cache_used_ratio", "tokens_per_second", "slots"):
        (sample,) = families[f"flashsloth_engine_{name}"].samples
        assert (sample.labels, sample.value >= 0) == ({"replica": "engine-1"}, True)
    (open_requests,) = families["flashsloth_open_requests"].samples
    assert open_requests.value == 0


def samples(families: dict[str, Any], name: str, suffix: str) -> list[Any]:
    return [sample for sample in families[name].samples if sample.name == name + suffix]


def test_the_page_needs_nothing_from_elsewhere(client: TestClient) -> None:
    response = client.get("/")
    policy = response.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "'unsafe-inline'" not in policy
    assert not re.findall(r'(?:src|href)="(?!data:)|https?://|@import|url\(', response.text)


def test_detail_low_shows_the_model_one_tile_s_worth(client: TestClient, backend: Backend) -> None:
    uri = data_uri(100, 80)  # below the tile's 126 pixels: nothing to take away
    for detail in ("low", "high"):
        parts = with_image(uri)
        parts[1]["image_url"]["detail"] = detail
        assert post(client, messages=[user(parts)]).status_code == 200
    np.testing.assert_array_equal(backend.prompts[0].pixel_values, backend.prompts[1].pixel_values)
