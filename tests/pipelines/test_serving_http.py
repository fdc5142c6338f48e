"""What clients get over HTTP: answers, streams, models, health, metrics and the page."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import re
import time
from typing import Any

import numpy as np
import pytest
from openai.types.chat import ChatCompletion
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from pipelines.serving.engine import Encoder
from pipelines.serving.errors import ApiError
from pipelines.serving.http import build_http
from pipelines.serving.metrics import IngressMetrics
from pipelines.serving.service import Service
from pipelines.serving.settings import Limits, Policy
from tests.fixtures.tiny import build_processor
from tests.serving_http import LIMITS, Backend, body, data_uri, encoded, post, stream, user, with_image


def test_an_answer_has_the_shape_of_a_completion(client: TestClient, backend: Backend) -> None:
    response = client.post("/v1/chat/completions", json=body(max_tokens=4), headers={"x-request-id": "mine-1"})
    assert response.status_code == 200, response.text
    answer = response.json()
    (prompt,) = backend.prompts
    (expected,) = backend.engine.generate([prompt])
    assert answer["id"] == "chatcmpl-mine-1"
    assert (answer["object"], answer["model"]) == ("chat.completion", "tiny")
    assert answer["system_fingerprint"] == "fp_abababababababab"  # of the model's hash
    (choice,) = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": expected.text}
    assert choice["finish_reason"] == expected.finish_reason
    assert answer["usage"] == {
        "prompt_tokens": len(prompt.input_ids),
        "completion_tokens": len(expected.token_ids),
        "total_tokens": len(prompt.input_ids) + len(expected.token_ids),
    }


def test_an_id_that_is_no_short_plain_text_is_replaced(client: TestClient) -> None:
    for sent, kept in (("mine-1", True), ("x" * 128, True), ("x" * 129, False), ("a b", False), (b"\xff", False)):
        answer = client.post("/v1/chat/completions", json=body(max_tokens=1), headers={"x-request-id": sent}).json()
        assert (answer["id"] == f"chatcmpl-{sent!s}") == kept
        assert re.fullmatch("chatcmpl-[A-Za-z0-9._:-]{1,128}", answer["id"])


def test_image_and_question_reach_the_engine_as_the_processor_makes_them(client: TestClient, backend: Backend) -> None:
    uri = data_uri()
    assert post(client, messages=[user(with_image(uri))]).status_code == 200
    processor = backend.engine.processor
    picture = Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1])))
    expected = processor.encode([user()], has_image=True)
    (prompt,) = backend.prompts
    assert (prompt.input_ids, prompt.question_ids) == (expected["input_ids"], expected["question_ids"])
    np.testing.assert_array_equal(prompt.pixel_values, processor.image_processor.to_uint8(picture))


def test_the_scheme_of_a_data_uri_is_written_in_any_case(client: TestClient, backend: Backend) -> None:
    scheme, _, payload = data_uri().partition("/")
    for uri in (data_uri(), f"{scheme.upper()}/{payload}", f"{scheme}/{payload.replace('base64', 'Base64', 1)}"):
        assert post(client, messages=[user(with_image(uri))]).status_code == 200
    assert len({prompt.image_key for prompt in backend.prompts}) == 1


def test_blanks_around_an_address_are_no_part_of_it(client: TestClient, backend: Backend) -> None:
    for uri in (data_uri(), f" {data_uri()}", f"\n{data_uri()}\n"):
        assert post(client, messages=[user(with_image(uri))]).status_code == 200
    assert len({prompt.image_key for prompt in backend.prompts}) == 1


def test_a_data_uri_may_be_broken_into_lines(client: TestClient, backend: Backend) -> None:
    header, _, payload = data_uri().partition(",")
    broken = header + "," + "\n".join(payload[start : start + 76] for start in range(0, len(payload), 76))
    for uri in (data_uri(), broken):
        assert post(client, messages=[user(with_image(uri))]).status_code == 200
    assert len({prompt.image_key for prompt in backend.prompts}) == 1


def test_an_answer_can_be_put_back_as_the_client_has_it(client: TestClient) -> None:
    """The official client's message has fields of all that its library knows of, most of them null."""
    answer = ChatCompletion.model_validate(post(client).json()).choices[0].message.model_dump()
    assert len(answer) > 2
    for said in ("Red.", "", answer["content"]):
        answer["content"] = said
        assert post(client, messages=[user(), answer, user("Sure?")]).status_code == 200


def test_fields_that_ask_for_nothing_are_taken(client: TestClient) -> None:
    nulls = dict.fromkeys(["audio", "functions", "prediction", "reasoning_effort", "verbosity", "of_next_year"])
    names = {"metadata": {"a": "b"}, "service_tier": "auto", "safety_identifier": "x", "prompt_cache_key": "y"}
    assert post(client, **nulls, **names).status_code == 200
    assert post(client, stream=True, stream_options={"include_usage": None}).status_code == 200
    image = {"type": "image_url", "image_url": {"url": data_uri(), "detail": None}}
    assert post(client, messages=[user([image, {"type": "text", "text": "What?"}])]).status_code == 200


def test_whoever_looks_by_head_sees_what_get_would_say(client: TestClient) -> None:
    for path in ("/", "/health", "/v1/models"):
        seen, got = client.head(path), client.get(path)
        assert (seen.status_code, seen.content) == (200, b"")
        assert seen.headers["content-length"] == str(len(got.content))


def test_nobody_is_redirected(client: TestClient) -> None:
    """Behind a reverse proxy with TLS, the address would lack it: token and picture would go in the clear."""
    for method, path in (("POST", "/v1/chat/completions/"), ("GET", "/health/")):
        response = client.request(method, path, follow_redirects=False)
        assert (response.status_code, response.json()["error"]["message"]) == (404, f"{method} {path}: Not Found")


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


def test_a_request_may_say_that_it_does_not_ask_for_what_is_not_done(client: TestClient, backend: Backend) -> None:
    """As clients do that spell out the defaults of the API, or send null for every field."""
    off = {
        "n": 1,
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "logprobs": False,
        "top_logprobs": 0,
        "logit_bias": {},
        "tools": [],
        "tool_choice": "none",
        "parallel_tool_calls": True,
        "response_format": {"type": "text"},
        "modalities": ["text"],
        "store": False,
        "functions": [],
        "function_call": "none",
        "reasoning_effort": "none",
        "verbosity": "medium",
        "prompt_cache_retention": "in_memory",
    }
    for changes in ({}, off, dict.fromkeys(off)):
        assert post(client, **changes).status_code == 200, changes
    assert backend.prompts[0].sampling == backend.prompts[1].sampling == backend.prompts[2].sampling


def test_an_answer_has_the_default_length_where_none_is_asked(client: TestClient, backend: Backend) -> None:
    assert post(client).status_code == 200
    assert backend.prompts[0].sampling.max_tokens == LIMITS.default_max_tokens


def test_where_none_is_asked_a_long_prompt_gets_what_is_left(
    client: TestClient, service: Service, backend: Backend
) -> None:
    service.adopt(Policy(limits=Limits()))
    long = [user("word " * 190)]
    left = 1024 - len(backend.engine.processor.encode(long, has_image=False)["input_ids"])
    assert 0 < left < Limits().default_max_tokens
    answer = post(client, messages=long).json()
    assert (answer["usage"]["completion_tokens"], answer["choices"][0]["finish_reason"]) == (left, "length")
    refused = post(client, messages=long, max_tokens=left + 1)
    assert (refused.status_code, "lower max_tokens" in refused.json()["error"]["message"]) == (422, True)
    too_long = post(client, messages=[user("word " * 400)])
    assert (too_long.status_code, "no room for an answer" in too_long.json()["error"]["message"]) == (422, True)


def test_models(client: TestClient) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["hash"]) == ("tiny", "model", "ab" * 32)
    assert client.get("/v1/models/tiny").json() == model
    assert client.get("/v1/models/another").status_code == 404


def test_unknown_paths_and_methods_have_the_same_shape(client: TestClient) -> None:
    assert client.get("/v2").json()["error"]["message"] == "GET /v2: Not Found"
    assert client.get("/v1/chat/completions").status_code == 405


def test_a_wrong_method_is_told_the_right_ones(client: TestClient) -> None:
    assert client.get("/v1/chat/completions").headers["allow"] == "POST"
    assert set(client.post("/v1/models").headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_a_stream_adds_up_to_the_whole_answer(client: TestClient) -> None:
    whole = post(client, max_tokens=20).json()
    _, events = stream(client, max_tokens=20, stream_options={"include_usage": True, "include_obfuscation": False})
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    common = ("id", "created", "model", "system_fingerprint")
    assert len({tuple(event[name] for name in common) for event in events}) == 1
    *chunks, usage = events
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert (usage["choices"], usage["usage"]) == ([], whole["usage"])
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)


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
    until_idle(backend)


def until_idle(backend: Backend) -> None:
    deadline = time.monotonic() + 10
    while backend.engine.stats().running:  # the engine lets go of a request at its next step
        assert time.monotonic() < deadline, "the slot is not freed"
        time.sleep(0.01)


def metrics_of(service: Service) -> str:
    return asyncio.run(service.read_metrics()).decode()


def test_who_leaves_before_the_first_event_is_let_go_of(service: Service, backend: Backend) -> None:
    """The response is cancelled where it sends its head, before any event was asked for."""
    left = asyncio.Event()
    sent = [{"type": "http.request", "body": json.dumps(body(stream=True, max_tokens=32)).encode()}]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": []}

    async def receive() -> dict[str, Any]:
        if sent:
            return sent.pop()
        await left.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        left.set()
        await asyncio.sleep(60)

    asyncio.run(build_http(service)(scope, receive, send))
    assert service._num_open == 0
    assert 'flashsloth_requests_total{replica="ingress-1",status="499"} 1.0' in metrics_of(service)
    until_idle(backend)


def test_health_follows_the_engine(
    client: TestClient, backend: Backend, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service._check, "_holds_s", 0)
    backend.error = RuntimeError("the model gives logits that are not finite")
    response = client.get("/health")
    backend.error = None
    assert client.get("/health").json() == {"status": "ok"}
    assert (response.status_code, response.json()["error"]["code"]) == (503, "unavailable")


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


def test_detail_low_changes_nothing_where_there_is_one_tile(
    client: TestClient, service: Service, backend: Backend
) -> None:
    service.adopt(Policy(limits=Limits()))
    uri = data_uri(400, 160)
    for detail in ("low", "high", "auto", "original"):
        assert post(client, messages=[user(in_detail(uri, detail))]).status_code == 200
    assert len({prompt.image_key for prompt in backend.prompts}) == 1


def test_detail_low_shows_an_hd_checkpoint_what_the_first_tile_shows(backend: Backend) -> None:
    """And no more: stripes that are too fine for it are grey in the tiles that show more."""
    encoder = Encoder(build_processor("hd"))
    policy = Policy(limits=Limits())
    service = Service("tiny", encoder, backend, IngressMetrics("hd"), policy, no_metrics, "ab" * 32)
    for width, height, period in ((1008, 252, 32), (252, 1008, 32), (600, 480, 8)):
        stripes = np.where(np.indices((height, width)).sum(0) % period < period // 2, 255, 0).astype(np.uint8)
        uri = encoded(Image.fromarray(stripes).convert("RGB"))
        low, high = (pixels_of(service, in_detail(uri, detail)).astype(int) for detail in ("low", "high"))
        assert np.abs(low[0] - high[0]).mean() < 10
    assert np.abs(low[1:] - high[1:]).mean() > 20
    small = data_uri(150, 120)  # its shorter side is below the tile's 126 pixels: nothing to take away
    np.testing.assert_array_equal(*(pixels_of(service, in_detail(small, detail)) for detail in ("low", "high")))


async def no_metrics() -> bytes:
    return b""


def in_detail(uri: str, detail: str) -> list[dict[str, Any]]:
    text, image = with_image(uri)
    return [text, {**image, "image_url": {"url": uri, "detail": detail}}]


def pixels_of(service: Service, parts: list[dict[str, Any]]) -> np.ndarray:
    request = json.dumps(body(messages=[user(parts)])).encode()
    pixels = asyncio.run(service.read(request)).prompt.pixel_values
    assert pixels is not None
    return pixels
