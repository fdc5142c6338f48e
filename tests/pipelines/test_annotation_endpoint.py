"""An annotation that asks a running service: what is sent, what refusals become; the answers are the engine's."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines import annotate as annotate_module
from pipelines.annotation import endpoint
from pipelines.annotation.endpoint import EndpointAsker, EndpointError, served_model
from pipelines.annotation.questions import row_seed
from pipelines.annotation.settings import EndpointSettings
from pipelines.preparation.sources import PlanError
from pipelines.serving.completions import fingerprint
from tests.annotation import annotate_here, annotate_settings, rows_of
from tests.chat_service import UNROUTED, Service, completion, refusal
from tests.corpus import encoded, picture, write_corpus

NUM_ROWS = 10


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    thread = threading.Thread(target=service.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield service
    service.shutdown()
    service.server_close()
    thread.join(10)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    write_corpus(tmp_path, NUM_ROWS)
    return tmp_path


def settings(corpus: Path, url: str, model: str | None = None, **change: Any) -> Any:
    endpoint = {"url": url, "model": model, "concurrency": 3, "max_retries": 2, "timeout_s": 30}
    return annotate_settings(corpus, checkpoint=None, endpoint=endpoint, **change)


def test_what_is_sent_and_what_is_kept(corpus: Path, service: Service) -> None:
    picture(1).save(corpus / "images" / "1.jpg", "BMP")  # a format that not every service takes
    asked = settings(corpus, service.url, temperature=0.5, stop=["END"], prompt="Why? {question}")
    manifest = annotate_here(asked)
    assert (manifest.rows, manifest.errors, manifest.model) == (NUM_ROWS, {}, "endpoint:tiny")
    rows = rows_of(asked.output)
    assert {(each["answer"], each["finish_reason"], each["prompt_tokens"], each["answer_tokens"]) for each in rows} == {
        ("Yes.", "stop", 7, 2)
    }
    assert service.tokens == {"Bearer token"}
    assert len({body["seed"] for body in service.asked}) == NUM_ROWS
    sent: list[str] = []
    for body in service.asked:
        assert (body["model"], body["max_tokens"], body["temperature"], body["stop"]) == ("tiny", 6, 0.5, ["END"])
        [message] = body["messages"]
        if isinstance(message["content"], str):
            assert message["content"] == "Why? How many?"
            continue
        image, text = message["content"]
        assert text == {"type": "text", "text": "Why? How many?"}
        sent.append(image["image_url"]["url"])
    assert sorted(uri.partition(";")[0] for uri in sent) == ["data:image/jpeg"] * 7 + ["data:image/png"]
    assert encoded(0) in [base64.b64decode(uri.partition(",")[2]) for uri in sent]


def test_refused_row_has_the_reason_and_others_their_answers(corpus: Path, service: Service) -> None:
    def reply(number: int, body: dict[str, Any]) -> tuple[int, Any]:
        if number == 4:
            return 422, refusal("this prompt is too long", "too_long")
        return 200, completion(None, "content_filter") if number == 5 else completion("Yes.")

    service.reply = reply
    asked = settings(corpus, service.url, max_error_share=0.5)
    assert annotate_here(asked).errors == {"no_answer": 1, "too_long": 1}
    errors = {each["error"] for each in rows_of(asked.output)}
    assert errors == {None, "too_long: this prompt is too long", "no_answer: the service ended with 'content_filter'"}


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        ({"error": {"message": "too\nlong", "param": ["messages", 0]}}, "too long"),
        ({"error": "it is too long"}, "it is too long"),
        ({"detail": "it is too long"}, "it is too long"),
        ({"detail": [{"loc": ["body", "n"], "msg": "bad"}]}, '[{"loc": ["body", "n"], "msg": "bad"}]'),
        ({"fault": 7}, '{"fault": 7}'),
        ("<p>no</p>", "<p>no</p>"),
        ("", "Error code: 422"),
    ],
)
def test_what_another_service_says_of_a_row_is_kept(corpus: Path, service: Service, refused: Any, said: str) -> None:
    service.reply = lambda number, body: (422, refused) if number == 4 else (200, completion("Yes."))
    asked = settings(corpus, service.url, max_error_share=0.5)
    assert annotate_here(asked).errors == {"refused": 1}
    assert {each["error"] for each in rows_of(asked.output)} == {None, f"refused: {said}"}


def test_busy_service_is_asked_again(corpus: Path, service: Service) -> None:
    busy = refusal("too many requests are waiting", "overloaded")
    service.reply = lambda number, body: (429, busy) if number < 3 else (200, completion("Yes."))
    assert annotate_here(settings(corpus, service.url)).errors == {}
    assert len(service.asked) == NUM_ROWS + 3


def test_busy_service_is_asked_for_as_long_as_it_answers_others(corpus: Path, service: Service) -> None:
    """The first row is refused until all others have their answers, far more often than it is asked again otherwise."""
    first, answered = row_seed(0, "corpus:0"), []

    def reply(number: int, body: dict[str, Any]) -> tuple[int, Any]:
        if body["seed"] == first and len(answered) < NUM_ROWS - 1:
            return 429, refusal("too many requests are waiting", "overloaded")
        time.sleep(0.4)
        answered.append(body["seed"])
        return 200, completion("Yes.")

    service.reply = reply
    asked = settings(corpus, service.url, chunk_rows=NUM_ROWS)
    asked.endpoint.max_retries = 1
    assert annotate_here(asked).errors == {}
    assert len(service.asked) > NUM_ROWS + 2


@pytest.mark.parametrize(("told", "least"), [("1", [1, 1, 2, 4]), ("30", [30] * 4), ("soon", [0.5, 1, 2, 4])])
def test_pauses_grow_and_are_none_shorter_than_the_service_says(
    told: str, least: list[float], service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(endpoint, "time", SimpleNamespace(sleep=pauses.append, monotonic=time.monotonic))
    monkeypatch.setattr(service, "retry_after", told)
    service.reply = lambda number, body: (503, refusal("no engine can answer", "unavailable"))
    asker = EndpointAsker(EndpointSettings(url=service.url, max_retries=4), "tiny", "token")
    with pytest.raises(EndpointError, match="answers 503: no engine can answer"):
        asker.ask({"model": "tiny", "messages": []}).result()
    asker.close()
    assert [shortest <= pause <= 1.25 * shortest for shortest, pause in zip(least, pauses, strict=True)] == [True] * 4


def test_refusal_that_every_row_would_get_ends_the_run_before_any_is_blamed(corpus: Path, service: Service) -> None:
    refused = refusal("max_tokens is 6, at most 5 are allowed", "max_tokens_too_large")
    refused["error"]["param"] = "max_tokens"
    service.hashes = {"tiny": "ab" * 32}
    service.reply = lambda number, body: (422, refused)
    asked = settings(corpus, service.url)
    with pytest.raises(EndpointError, match="refuses max_tokens: max_tokens is 6, at most 5 are allowed"):
        annotate_here(asked)
    assert not (corpus / "out" / "parts").exists()


@pytest.mark.parametrize(
    ("status", "code", "said"),
    [
        (401, "invalid_token", "answers 401: no; set OPENAI_API_KEY to a token of this service"),
        (404, None, "answers 404: no; endpoint.url is the base of the API, such as http://127.0.0.1:8000/v1"),
        (404, "model_not_found", "answers 404: no"),
        (429, "rate_limited", "answers 429: no; lower endpoint.concurrency, or raise what the service allows"),
    ],
)
def test_what_ends_the_run_says_what_helps(
    corpus: Path, service: Service, status: int, code: str | None, said: str
) -> None:
    service.reply = lambda number, body: (status, {"error": {"message": "no", "code": code}})
    asked = settings(corpus, service.url)
    asked.endpoint.max_retries = 0
    with pytest.raises(EndpointError) as raised:
        annotate_here(asked)
    assert str(raised.value) == f"{service.url}: {said}"


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ("<html>Welcome!</html>", "Invalid JSON: expected value"),
        ("{", "Invalid JSON: EOF"),
        ({"error": {"message": "quota"}}, "choices: Field required"),
        (completion("Yes.") | {"choices": []}, "choices: List should have at least 1 item"),
        (completion("Yes.") | {"choices": [{"index": 0}]}, "choices.0.message: Field required"),
        (completion("half \ud83d"), "Invalid JSON: unexpected end of hex escape"),
    ],
)
def test_what_is_no_completion_fails_the_row_or_all_of_them(
    answer: Any, said: str, corpus: Path, service: Service
) -> None:
    first = row_seed(0, "corpus:0")
    service.reply = lambda number, body: (200, answer if body.get("seed") == first else completion("Yes."))
    assert annotate_here(settings(corpus, service.url)).errors == {"no_answer": 1}
    [failed] = [each["error"] for each in rows_of(str(corpus / "out")) if each["error"]]
    assert failed.startswith(f"no_answer: the service answers what is no completion: {said}")
    service.reply = lambda number, body: (200, answer)
    with pytest.raises(EndpointError, match=f"{service.url}: the service answers what is no completion: {said}"):
        annotate_here(settings(corpus, service.url, output=str(corpus / "other")))


@pytest.mark.parametrize("answer", ["<html>Welcome!</html>", "{", "[]", '{"data": null}'])
def test_what_is_no_list_of_models_is_called_so(answer: str, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service.RequestHandlerClass, "do_GET", lambda handler: handler._answer(200, answer))
    with pytest.raises(EndpointError, match=f"{service.url}: answers what is no list of models: .*endpoint.url is the"):
        served_model(EndpointSettings(url=service.url), "t")


def test_model_that_our_service_does_not_have_is_found_before_anything_is_written(service: Service) -> None:
    service.hashes = {"tiny": "ab" * 32}
    with pytest.raises(EndpointError, match=r"serves tiny, not tinny: endpoint\.model"):
        served_model(EndpointSettings(url=service.url, model="tinny"), "t")


@pytest.mark.parametrize(
    ("token", "sent"), [("secret\n", "secret"), ("", "none"), ("schl\u00fcssel", None), ("a\nb", None)]
)
def test_token_is_what_a_header_can_hold(token: str, sent: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", token)
    if sent is not None:
        assert annotate_module._token() == sent
        return
    with pytest.raises(ValueError, match="OPENAI_API_KEY holds characters that no header may") as raised:
        annotate_module._token()
    assert token not in str(raised.value)


def test_service_that_starts_anew_is_waited_for(corpus: Path, service: Service) -> None:
    """Until it is there, what stands before it knows no such path."""
    service.reply = lambda number, body: (404, UNROUTED) if number % 4 == 1 else (200, completion("Yes."))
    asked = settings(corpus, service.url, max_error_share=0)
    assert annotate_here(asked).errors == {}
    assert len(service.asked) > NUM_ROWS


def test_service_that_has_gone_ends_the_run(corpus: Path, service: Service) -> None:
    service.reply = lambda number, body: (404, UNROUTED)
    with pytest.raises(EndpointError, match="answers 404"):
        annotate_here(settings(corpus, service.url))


def test_list_of_models_that_is_not_there_yet_is_not_taken_for_none(service: Service) -> None:
    service.hashes = {"tiny": "ab" * 32}
    service.unrouted = 1
    chosen = EndpointSettings(url=service.url, model="tiny", max_retries=1)
    assert served_model(chosen, "token") == f"tiny@sha256:{'ab' * 32}"
    service.unrouted = 5
    with pytest.raises(EndpointError, match="404"):
        served_model(chosen, "token")


def test_service_that_stays_broken_is_named_and_no_row_is_blamed(corpus: Path, service: Service) -> None:
    service.reply = lambda number, body: (500, refusal("the engine is gone", "internal_error"))
    asked = settings(corpus, service.url)
    with pytest.raises(EndpointError, match=f"{service.url}: answers 500: .*the engine is gone"):
        annotate_here(asked)
    service.reply = lambda number, body: (200, completion("Yes."))
    assert annotate_here(asked).errors == {}
    assert [each["key"] for each in rows_of(asked.output)] == [f"corpus:{number}" for number in range(NUM_ROWS)]


def fail_at(number: int, status: int) -> Callable[[int, dict[str, Any]], tuple[int, Any]]:
    """Answers that fail whenever the row `number` is asked."""
    seed = row_seed(0, f"corpus:{number}")

    def reply(_: int, body: dict[str, Any]) -> tuple[int, Any]:
        if body.get("seed") == seed:
            return status, refusal("the engine could not answer this request", "engine_error")
        return 200, completion("Yes.")

    return reply


def test_row_at_which_the_service_fails_has_its_error_and_the_others_their_answers(
    corpus: Path, service: Service
) -> None:
    service.reply = fail_at(9, 500)
    asked = settings(corpus, service.url)
    assert annotate_here(asked).errors == {"engine_error": 1}
    *others, last = rows_of(asked.output)
    assert {each["error"] for each in others} == {None}
    assert last["error"] == "engine_error: the service answers 500: the engine could not answer this request"
    assert (last["answer"], last["finish_reason"]) == (None, "error")
    assert len(service.asked) == NUM_ROWS + 3  # twice again, and another question


@pytest.mark.parametrize("status", [429, 503])
def test_service_that_is_busy_or_away_at_one_row_is_no_fault_of_the_row(
    corpus: Path, service: Service, status: int
) -> None:
    service.reply = fail_at(9, status)
    with pytest.raises(EndpointError, match=f"{service.url}: answers {status}: "):
        annotate_here(settings(corpus, service.url))


def test_answer_that_our_service_cuts_before_its_length_is_no_answer(corpus: Path, service: Service) -> None:
    """Six tokens are asked for. What others cut, whose context may be full, is an answer of its length."""
    service.reply = lambda number, body: (200, completion("Yes it", "length", 6 if number else 2))
    other = settings(corpus, service.url, output=str(corpus / "other"))
    assert annotate_here(other).errors == {}
    assert sorted(each["answer_tokens"] for each in rows_of(other.output)) == [2] + [6] * (NUM_ROWS - 1)
    service.hashes = {"tiny": "ab" * 32}
    service.asked.clear()
    ours = settings(corpus, service.url)
    assert annotate_here(ours).errors == {"deadline": 1}
    [cut] = [each for each in rows_of(ours.output) if each["error"]]
    assert (cut["answer"], cut["finish_reason"], cut["prompt_tokens"], cut["answer_tokens"]) == (None, "error", 7, 0)
    assert cut["error"].startswith("deadline: the service's time was over after 2 of 6 tokens; raise its limits.")


def test_the_model_is_the_only_one_or_the_chosen_one(service: Service) -> None:
    assert served_model(EndpointSettings(url=service.url), "t") == "tiny"
    service.models = ["a", "b"]
    with pytest.raises(EndpointError, match=r"serves a, b; choose one: endpoint\.model"):
        served_model(EndpointSettings(url=service.url), "t")
    assert served_model(EndpointSettings(url=service.url, model="b"), "t") == "b"


def test_service_without_a_list_needs_the_name(service: Service) -> None:
    service.models = None
    assert served_model(EndpointSettings(url=service.url, model="b"), "t") == "b"
    with pytest.raises(EndpointError, match=f"{service.url}: .*404"):
        served_model(EndpointSettings(url=service.url), "t")


@pytest.mark.parametrize("chosen", [None, "tiny"])
def test_hash_of_the_model_is_kept_where_the_service_tells_it(
    corpus: Path, service: Service, monkeypatch: pytest.MonkeyPatch, chosen: str | None
) -> None:
    """And a run that is resumed after the service has got another model under the same name is refused."""
    service.hashes = {"tiny": "ab" * 32}
    asked = settings(corpus, service.url, model=chosen)
    model = f"endpoint:tiny@sha256:{'ab' * 32}"
    assert annotate_here(asked).model == model
    assert {each["model"] for each in rows_of(asked.output)} == {model}
    assert {body["model"] for body in service.asked} == {"tiny"}
    service.hashes = {"tiny": "cd" * 32}
    monkeypatch.setattr(annotate_module, "start_ray", lambda: pytest.fail("it went on"))
    with pytest.raises(PlanError, match=f"other terms: model: was '{model}', now 'endpoint:tiny@sha256:{'cd' * 32}'"):
        annotate_module.annotate(asked)


def test_another_model_that_takes_over_while_a_run_asks_ends_it(corpus: Path, service: Service) -> None:
    """What the first one answered is kept; by the time the run goes on, the list tells of the second one."""
    service.hashes = {"tiny": "ab" * 32}
    service.reply = lambda number, _: (
        200,
        completion("Yes.") | {"system_fingerprint": fingerprint(("ab" if number < 4 else "cd") * 32)},
    )
    asked = settings(corpus, service.url)
    bears, began = "fp_cdcdcdcdcdcdcdcd", "fp_abababababababab"
    with pytest.raises(
        EndpointError, match=f"tiny is another model now: its answers bear {bears}, .* began with {began}"
    ):
        annotate_here(asked)
    service.reply = lambda number, _: (200, completion("Yes.") | {"system_fingerprint": began})
    assert annotate_here(asked).errors == {}
    assert [each["key"] for each in rows_of(asked.output)] == [f"corpus:{number}" for number in range(NUM_ROWS)]


def test_nobody_there(service: Service) -> None:
    service.server_close()
    with pytest.raises(EndpointError, match=f"{service.url}: no answer"):
        served_model(EndpointSettings(url=service.url, max_retries=0), "t")
