"""The service on Ray Serve, asked by the official client."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image
from pydantic import ValidationError
from ray import serve
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary
from ray.serve.config import HTTPOptions
from ray.serve.schema import LoggingConfig

from pipelines.serving.app import build_app
from pipelines.serving.checkpoint import CheckpointError
from pipelines.serving.engine import Encoder, Engine, EngineSettings
from pipelines.serving.sampling import Sampling
from pipelines.serving.settings import ServeArgs

QUIET = LoggingConfig(log_level="ERROR", enable_access_log=False)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def data_uri(seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def question(url: str, text: str = "What color is the square?") -> list[dict[str, Any]]:
    content = [{"type": "text", "text": text}, {"type": "image_url", "image_url": {"url": url}}]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def address(ray_session: None, tiny_checkpoint: Path) -> Iterator[str]:
    """A service that answers 8 requests at once, lets 8 more wait, and turns away more."""
    port = free_port()
    serve.start(http_options=HTTPOptions(host="127.0.0.1", port=port), logging_config=QUIET)
    args = ServeArgs(
        checkpoint=str(tiny_checkpoint),
        model_name="tiny",
        device="cpu",
        engine=EngineSettings(max_slots=8, max_waiting=8),
        image_hosts=["pictures.example"],
    )
    serve.run(build_app(args), logging_config=QUIET)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()


@pytest.fixture
def client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def engine(tiny_checkpoint: Path) -> Engine:
    return Engine.from_checkpoint(tiny_checkpoint, "cpu")


def expected_answer(engine: Engine, seed: int, max_tokens: int) -> str:
    picture = Image.open(io.BytesIO(base64.b64decode(data_uri(seed).split(",")[1])))
    messages = [{"role": "user", "content": "What color is the square?"}]
    prompt = Encoder(engine.processor).prompt(messages, picture, Sampling(max_tokens=max_tokens))
    return engine.generate([prompt])[0].text


@pytest.mark.ray
def test_the_openai_client_gets_the_engines_answer(client: openai.OpenAI, engine: Engine) -> None:
    answer = client.chat.completions.create(model="tiny", messages=question(data_uri(0)), max_tokens=8)
    assert answer.choices[0].message.content == expected_answer(engine, 0, 8)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert [model.id for model in client.models.list()] == ["tiny"]


@pytest.mark.ray
def test_one_bad_image_among_eight_requests_fails_alone(client: openai.OpenAI, engine: Engine) -> None:
    """All at once, in one batch: 422 for the bad one, and for the others what each gets by itself."""
    cut_off = data_uri(3)[:200]
    urls = [cut_off if place == 3 else data_uri(place) for place in range(8)]

    def ask(url: str) -> str | int:
        try:
            answer = client.chat.completions.create(model="tiny", messages=question(url), max_tokens=8)
        except openai.APIStatusError as error:
            assert error.code in ("image_truncated", "image_undecodable")
            return error.status_code
        return answer.choices[0].message.content

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, urls))
    assert answers == [422 if place == 3 else expected_answer(engine, place, 8) for place in range(8)]


@pytest.mark.ray
def test_the_async_client(address: str, engine: Engine) -> None:
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            calls = [
                client.chat.completions.create(model="tiny", messages=question(data_uri(seed)), max_tokens=5)
                for seed in range(4)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*calls)]

    assert asyncio.run(ask_all()) == [expected_answer(engine, seed, 5) for seed in range(4)]


@pytest.mark.ray
def test_requests_keep_their_id(address: str, client: openai.OpenAI) -> None:
    request = urllib.request.Request(f"{address}/health", headers={"x-request-id": "mine-7"})
    with urllib.request.urlopen(request, timeout=30) as response:
        assert json.load(response) == {"status": "ok"}
        assert response.headers.get_all("x-request-id") == ["mine-7"]
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="other", messages=question(data_uri(0)))
    assert caught.value.request_id
    assert caught.value.code == "model_not_found"


@pytest.mark.ray
def test_a_flood_is_turned_away_and_the_rest_is_answered(client: openai.OpenAI) -> None:
    def ask(seed: int) -> str:
        try:
            client.chat.completions.create(model="tiny", messages=question(data_uri(seed)), max_tokens=400)
        except openai.RateLimitError as error:
            assert error.response.headers["retry-after"]
            return "turned away"
        return "answered"

    with ThreadPoolExecutor(64) as pool:
        outcomes = list(pool.map(ask, range(64)))
    assert set(outcomes) == {"answered", "turned away"}
    assert ask(0) == "answered"


def test_a_wrong_folder_is_refused_before_anything_starts() -> None:
    with pytest.raises(CheckpointError, match="/nowhere: no such folder"):
        build_app(ServeArgs(checkpoint="/nowhere"))


def test_the_args_of_a_serve_file_are_validated(tiny_checkpoint: Path) -> None:
    """As Serve does it for `import_path` and `args:`: by the annotation of the builder."""
    build = call_user_app_builder_with_args_if_necessary
    application = build(build_app, {"checkpoint": str(tiny_checkpoint), "num_replicas": "2"})
    assert isinstance(application, Application)
    with pytest.raises(ValidationError, match=r"num_replica\b"):
        build(build_app, {"checkpoint": str(tiny_checkpoint), "num_replica": 4})
