"""Every request that is wrong gets a clear refusal, in OpenAI's shape, before the model sees it."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image
from starlette.testclient import TestClient

from pipelines.serving.engine import Answer, Encoder, Engine, Prompt
from pipelines.serving.http import Service, build_http
from pipelines.serving.protocol import ApiError
from pipelines.serving.settings import Limits
from tests.fixtures.tiny import build_processor, build_tiny_model

LIMITS = Limits(
    max_body_bytes=60_000, max_image_pixels=10_000, max_prompt_tokens=160, max_tokens=32, default_max_tokens=6
)


class Backend:
    """An engine in this process, which remembers what it was given."""

    def __init__(self) -> None:
        processor = build_processor()
        self.engine = Engine(build_tiny_model(processor), processor)
        self.prompts: list[Prompt] = []
        self.error: Exception | None = None

    async def answer(self, prompt: Prompt) -> Answer | ApiError:
        self.prompts.append(prompt)
        if self.error:
            raise self.error
        return self.engine.generate([prompt])[0]

    async def check(self) -> None:
        if self.error:
            raise self.error
        self.engine.check()


@pytest.fixture(scope="module")
def shared_backend() -> Backend:
    return Backend()


@pytest.fixture
def backend(shared_backend: Backend) -> Backend:
    shared_backend.prompts, shared_backend.error = [], None
    return shared_backend


@pytest.fixture
def client(backend: Backend) -> Iterator[TestClient]:
    service = Service("tiny", LIMITS, Encoder(backend.engine.processor), backend.answer, backend.check)
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
    expected = backend.engine.generate([prompt])[0]
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
    "stream": ({"stream": True}, "stream", "streaming is not supported"),
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


def test_health_follows_the_engine(client: TestClient, backend: Backend) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    backend.error = RuntimeError("the model gives logits that are not finite")
    response = client.get("/health")
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
