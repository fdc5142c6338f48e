"""The service on Ray Serve, asked by the official client."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
from PIL import Image
from pydantic import ValidationError
from ray import serve
from ray.serve import Application
from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

import pipelines.serving.app
from pipelines.annotate import annotate
from pipelines.annotation.verify import verify
from pipelines.serving.app import Ingress, build_app
from pipelines.serving.checkpoint import CheckpointError
from pipelines.serving.engine import Encoder, Engine, EngineSettings
from pipelines.serving.sampling import Sampling
from pipelines.serving.settings import ServeArgs
from tests.annotation import annotate_here, annotate_settings, rows_of
from tests.corpus import row, write_corpus
from tests.serving import (
    APPLICATION,
    Load,
    data_uri,
    question,
    read_metrics,
    request_body,
    running_service,
    total,
    until,
)


@pytest.fixture(scope="module")
def address(ray_session: None, tiny_checkpoint: Path) -> Iterator[str]:
    """A service that answers 8 requests at once, and starts a second engine where more keep coming."""
    args = ServeArgs(
        checkpoint=str(tiny_checkpoint),
        model_name="tiny",
        device="cpu",
        max_replicas=2,
        upscale_delay_s=0.5,
        engine=EngineSettings(max_slots=8, max_waiting=8),
        image_hosts=["pictures.example"],
    )
    with running_service(args) as address:
        yield address


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
def test_the_clients_stream(address: str, client: openai.OpenAI, engine: Engine) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": question(data_uri(0)), "max_tokens": 20, "stream": True}
    chunks = list(client.chat.completions.create(**asked, stream_options={"include_usage": True}))
    *pieces, usage = chunks
    assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == expected_answer(engine, 0, 20)
    assert pieces[-1].choices[0].finish_reason in ("stop", "length")
    assert (usage.choices, usage.usage.completion_tokens) == ([], 20)
    assert usage.usage.prompt_tokens > 20

    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
            stream = await client.chat.completions.create(**asked)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(ask()) == expected_answer(engine, 0, 20)


@pytest.mark.ray
@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(address: str, stream: bool) -> None:
    """Long before the answer would have ended; that it takes one step is shown at the engine's side of the border."""

    async def check() -> float:
        async def free() -> bool:
            return await total(address, "engine_slots_used") == 0

        async def used() -> bool:
            return await total(address, "engine_slots_used") == 1

        await until(free, 30, "no slot in use")
        before = await total(address, "engine_generated_tokens_total")
        async with aiohttp.ClientSession() as session:
            body = {"model": "tiny", "messages": question(data_uri(0)), "max_tokens": 900, "stream": stream}
            asking = asyncio.create_task(session.post(f"{address}/v1/chat/completions", json=body))
            if stream:
                response = await asking
                await response.content.readany()
                response.close()
            else:
                await until(used, 30, "a slot in use")
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
            await until(free, 30, "the slot free again")
        return await total(address, "engine_generated_tokens_total") - before

    assert 0 < asyncio.run(check()) < 900


@pytest.mark.ray
def test_the_metrics_of_all_replicas(address: str, client: openai.OpenAI) -> None:
    client.chat.completions.create(model="tiny", messages=question(data_uri(0)), max_tokens=5)
    metrics = asyncio.run(read_metrics(address))
    for name in (
        "time_to_first_token_seconds_count",
        "requests_total",
        "tokens_total",
        "engine_generated_tokens_total",
        "engine_slots",
    ):
        assert sum(metrics[f"flashsloth_{name}"].values()) > 0, name
    for name in ("queue", "batch_size", "kv_cache_used_ratio", "tokens_per_second"):
        assert metrics[f"flashsloth_engine_{name}"].keys() == metrics["flashsloth_engine_slots"].keys(), name


@pytest.mark.ray
@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data/",
        "http://localhost/x.png",
        "http://10.0.0.1/x.png",
        "file:///etc/passwd",
        "https://pictures.example.evil.example/x.png",
    ],
)
def test_images_are_fetched_from_nowhere_but_the_allowed_hosts(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as caught:
        client.chat.completions.create(model="tiny", messages=question(url))
    assert caught.value.code == "image_url_not_allowed"


@pytest.mark.ray
def test_the_page_is_at_the_root(address: str) -> None:
    with urllib.request.urlopen(address, timeout=30) as response:
        assert "<title>FlashSloth</title>" in response.read().decode()


@pytest.mark.ray
def test_an_annotation_asks_the_service_and_gets_the_engines_answers(
    address: str, tmp_path: Path, tiny_checkpoint: Path
) -> None:
    write_corpus(tmp_path, [*(row(number) for number in range(10)), row(0, image="images/nowhere.jpg")])
    expected = annotate_settings(tmp_path, checkpoint=str(tiny_checkpoint), output=str(tmp_path / "own"))
    model = annotate_here(expected).model
    endpoint = {"url": f"{address}/v1", "concurrency": 3, "max_retries": 2, "timeout_s": 30}
    asked = annotate_settings(tmp_path, checkpoint=None, endpoint=endpoint, workers={"num_cpus": 0.5})
    manifest = annotate(asked)
    assert manifest is not None and manifest.errors == {"image_missing": 1}
    assert manifest.model == f"endpoint:tiny@sha256:{model}"
    assert verify(asked.output) == []
    same = ("key", "id", "answer", "finish_reason", "prompt_tokens", "answer_tokens", "error", "messages", "image")
    assert [{name: each[name] for name in same} for each in rows_of(asked.output)] == [
        {name: each[name] for name in same} for each in rows_of(expected.output)
    ]


@pytest.mark.ray
def test_a_queue_that_lasts_starts_another_engine(address: str) -> None:
    """The last one to ask this service: it has two engines from here on."""

    async def check() -> None:
        async def num_engines() -> int:
            return len((await read_metrics(address))["flashsloth_engine_slots"])

        async def two() -> bool:
            return await num_engines() == 2

        async def two_begun() -> bool:
            status = await asyncio.to_thread(serve.status)
            return sum(status.applications[APPLICATION].deployments["Engine"].replica_states.values()) == 2

        assert await num_engines() == 1  # the tests before have never asked for more than 8 answers at once
        load = Load(address)
        async with load.running(14, lambda source: request_body(source.randrange(100), 200)):
            await until(two_begun, 90, "a second engine that starts")
        await until(two, 90, "a second engine")
        assert set(load.outcomes) == {"200"}, load.outcomes

    asyncio.run(check())


def test_the_bounds_of_autoscaling(tiny_checkpoint: Path) -> None:
    args = ServeArgs(
        checkpoint=str(tiny_checkpoint), num_replicas=2, max_replicas=5, engine=EngineSettings(max_slots=16)
    )
    (engines,) = build_app(args)._bound_deployment.init_args[2:]
    scaling = engines._bound_deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas, scaling.target_ongoing_requests) == (2, 5, 16)
    with pytest.raises(ValidationError, match="max_replicas is 1, less than num_replicas, 2"):
        ServeArgs(checkpoint="x", num_replicas=2, max_replicas=1)


class NoEngines:
    """The handle of a deployment that nobody asks."""

    def options(self, **_: Any) -> NoEngines:
        return self


@pytest.mark.parametrize("limits", [{"max_tokns": 7}, {"max_tokens": 0}, None, 7])
def test_a_wrong_user_config_changes_nothing_of_a_running_ingress_and_starts_none(
    limits: Any, tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Serve would replace one that raises by another one that raises as well, until nobody is left."""
    monkeypatch.setattr(pipelines.serving.app, "_replica_name", lambda: "ingress")
    args = ServeArgs(checkpoint=str(tiny_checkpoint))
    ingress = Ingress(args, "tiny", NoEngines())
    with pytest.raises(ValueError, match=r"^user_config is refused: limits[^\n]*$"):
        ingress.reconfigure({"limits": limits})
    ingress.reconfigure({"limits": {"max_tokens": 9}})
    with caplog.at_level(logging.ERROR, logger="ray.serve"):
        ingress.reconfigure({"limits": limits})
    assert ingress._service.limits.max_tokens == 9
    (line,) = [record.getMessage() for record in caplog.records]
    assert ".".join(["limits", *(limits if isinstance(limits, dict) else [])]) + ": " in line
    ingress.reconfigure({})
    assert ingress._service.limits == args.limits


def test_user_config_allows_no_answer_longer_than_the_service_was_deployed_for(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipelines.serving.app, "_replica_name", lambda: "ingress")
    ingress = Ingress(ServeArgs(checkpoint=str(tiny_checkpoint)), "tiny", NoEngines())
    with pytest.raises(ValueError, match="101 is more than the 100 of `args`"):
        ingress.reconfigure({"limits": {"deadline_s": 101}})
    ingress.reconfigure({"limits": {"deadline_s": 50}})
    with caplog.at_level(logging.ERROR, logger="ray.serve"):
        ingress.reconfigure({"limits": {"deadline_s": 101}})
    assert ingress._service.limits.deadline_s == 50
    assert "user_config is refused and changes nothing" in caplog.text and "request_timeout_s" in caplog.text


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
