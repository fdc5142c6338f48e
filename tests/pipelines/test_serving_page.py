"""The page in a real browser: Debian's Chromium, headless, over real HTTP to a real engine. Leaves screenshots."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import uvicorn
from PIL import Image
from playwright.sync_api import Browser, Page, expect, sync_playwright

from pipelines.serving.authentication import hash_token
from pipelines.serving.engine import Encoder, Engine, EngineSettings
from pipelines.serving.http import build_http
from pipelines.serving.metrics import IngressMetrics
from pipelines.serving.replies import Desk
from pipelines.serving.service import Service
from pipelines.serving.settings import Limits, Policy
from pipelines.serving.transport import free_port
from tests.fixtures.ray_session import REPOSITORY
from tests.fixtures.tiny import build_processor, build_tiny_model
from tests.serving import png
from tests.serving_http import Backend

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SCREENSHOTS = REPOSITORY / "outputs" / "screenshots"  # ignored by git, kept as the artefact of a test run
PATIENCE_MS = 30_000

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium found (on Debian and Ubuntu: apt-get install chromium)"
)


class HdBackend(Backend):
    """An engine of an HD checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.engine.close()
        processor = build_processor("hd")
        self.engine = Engine(build_tiny_model(processor), processor, EngineSettings(max_slots=2))
        self.desk = Desk(self.engine)


class Site:
    """A running service without Ray: the page needs none."""

    def __init__(self, backend: Backend) -> None:
        async def no_metrics() -> bytes:
            return b""

        self.backend = backend
        self.policy = Policy(limits=Limits(default_max_tokens=60))
        encoder = Encoder(backend.engine.processor)
        self.service = Service("tiny", encoder, backend, IngressMetrics("one"), self.policy, no_metrics, "ab" * 32)
        port = free_port()
        self.address = f"http://127.0.0.1:{port}/"
        self._server = uvicorn.Server(uvicorn.Config(build_http(self.service), port=port, log_level="error"))
        self._thread = threading.Thread(target=self._server.run)
        self._thread.start()
        deadline = time.monotonic() + 30
        while not self._server.started:
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.01)

    def close(self) -> None:
        self._server.should_exit = True
        self._thread.join()
        self.backend.engine.close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=[*flags, "--disable-sync"])
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=["base", "hd"])
def any_site(request: pytest.FixtureRequest) -> Iterator[Site]:
    site = Site(Backend() if request.param == "base" else HdBackend())
    yield site
    site.close()


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    site = Site(Backend())
    yield site
    site.close()


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Any]:
    """Open pages that must neither complain nor ask anybody but the service for anything."""
    contexts = []
    problems: list[str] = []

    def watched(site: Site, **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda line: problems.append(line.text) if "Content Security" in line.text else None)
        page.on(
            "request",
            lambda request: (
                None if request.url.startswith((site.address, "data:", "blob:")) else problems.append(request.url)
            ),
        )
        page.goto(site.address)
        return page

    yield watched
    for context in contexts:
        context.close()
    assert problems == []


def pictures(*seeds: int) -> list[dict[str, Any]]:
    return [{"name": f"{seed}.png", "mimeType": "image/png", "buffer": png(seed)} for seed in seeds]


def ask(page: Page, question: str) -> None:
    page.locator("#question").fill(question)
    page.locator("#question").press("Enter")


def wait_for_answers(page: Page, count: int) -> None:
    expect(page.locator(".figures")).to_have_count(count, timeout=PATIENCE_MS)


def test_a_picture_is_asked_about_in_several_turns(any_site: Site, open_page: Any) -> None:
    any_site.backend.prompts.clear()
    page = open_page(any_site)
    expect(page.locator("#model")).to_have_text("tiny")
    page.set_input_files("#files", pictures(0))
    expect(page.locator("#talk > img")).to_be_visible()
    for question in ("What color is the square?", "How many circles are there?"):
        page.keyboard.type(question)  # the focus is where one types
        page.keyboard.press("Enter")
        wait_for_answers(page, page.locator(".user").count())
    figures = page.locator(".figures").first.text_content()
    assert re.fullmatch(r"first token \d+ ms · ([\d.]+ tokens/s · )?\d+ tokens", figures), figures
    first, second = any_site.backend.prompts
    assert first.pixel_values is not None
    assert max(second.question_ids) == 2
    (expected,) = any_site.backend.engine.generate([first])
    assert page.locator(".assistant").first.text_content() == expected.text
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=SCREENSHOTS / f"page-{any_site.service.tiling}.png")


def test_the_hd_switch_is_there_where_the_checkpoint_has_it(any_site: Site, open_page: Any) -> None:
    page = open_page(any_site)
    expect(page.locator("#model")).to_have_text("tiny")
    switch = page.get_by_label("HD")
    if any_site.service.tiling == "base":
        expect(switch).to_be_hidden()
        return
    bodies: list[Any] = []
    page.on("request", lambda request: bodies.append(request.post_data_json) if request.method == "POST" else None)
    page.set_input_files("#files", pictures(1))
    for count, detail in ((1, "high"), (2, "low")):
        switch.set_checked(detail == "high")
        page.locator("#question").fill("What is it?")
        page.get_by_role("button", name="Ask").click()
        wait_for_answers(page, count)
        assert bodies[-1]["messages"][0]["content"][0]["image_url"]["detail"] == detail


def test_pictures_are_dropped_and_each_has_its_own_conversation(site: Site, open_page: Any) -> None:
    page = open_page(site)
    page.evaluate(
        """(pictures) => {
            const transfer = new DataTransfer();
            for (const [name, data] of pictures) {
                const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
                transfer.items.add(new File([bytes], name, { type: "image/png" }));
            }
            document.body.dispatchEvent(new DragEvent("drop", { dataTransfer: transfer, bubbles: true }));
        }""",
        [[f"{seed}.png", base64.b64encode(png(seed)).decode()] for seed in (1, 2)],
    )
    expect(page.get_by_role("tab")).to_have_count(3)
    page.keyboard.type("What is it?\n")
    wait_for_answers(page, 1)
    page.get_by_role("tab").nth(2).press("ArrowLeft")
    expect(page.locator(".turn")).to_have_count(0)
    expect(page.locator("#talk > img")).to_have_attribute("alt", "1.png")
    page.keyboard.press("ArrowRight")
    expect(page.locator(".turn")).to_have_count(2)


def test_who_asks_before_the_model_is_known_is_answered(site: Site, open_page: Any) -> None:
    page = open_page(site)
    page.add_init_script(
        """const real = window.fetch;
        window.fetch = async (address, ...rest) => {
            if (address === "v1/models") await new Promise((go) => { window.tellModels = go; });
            return real(address, ...rest);
        };"""
    )
    page.reload()
    page.keyboard.type("What is it?\n")
    expect(page.locator("#model")).to_have_text("")
    page.evaluate("tellModels()")
    wait_for_answers(page, 1)


def test_who_asks_a_service_that_was_away_is_answered(site: Site, open_page: Any) -> None:
    page = open_page(site)
    page.route("**/v1/models", lambda route: route.abort())
    page.reload()
    expect(page.locator("#model")).to_have_text("Failed to fetch")
    page.unroute("**/v1/models")
    page.keyboard.type("What is it?\n")
    wait_for_answers(page, 1)
    expect(page.locator("#model")).to_have_text("tiny")


def test_who_reads_further_up_or_is_at_a_tab_stays_there(
    site: Site, open_page: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = site.backend.engine._batch
    step, steps = batch.step, threading.Semaphore(400)
    monkeypatch.setattr(batch, "step", lambda: steps.acquire(timeout=PATIENCE_MS / 1000) and step())
    site.service.adopt(Policy(limits=Limits(default_max_tokens=900)))
    page = open_page(site, viewport={"width": 320, "height": 400})
    page.set_input_files("#files", pictures(4))
    expect(page.locator("#model")).to_have_text("tiny")
    page.locator("#question").press_sequentially("Hi\n")
    answer = page.locator(".assistant")
    expect(answer).to_have_text(re.compile(".{200,}", re.DOTALL), timeout=PATIENCE_MS)
    place = "[document.activeElement.getAttribute('role'), document.getElementById('talk').scrollTop]"
    assert page.evaluate(place)[1] > 50  # it follows the answer
    page.get_by_role("tab").nth(1).focus()
    page.evaluate("document.getElementById('talk').scrollTop = 0")
    steps.release(1000)
    wait_for_answers(page, 1)
    assert page.evaluate(place) == ["tab", 0]
    site.service.adopt(site.policy)


def test_the_answer_streams_and_can_be_stopped(site: Site, open_page: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = site.backend.engine._batch
    step, steps = batch.step, threading.Semaphore(400)  # it makes as many tokens as it is allowed here, and waits
    monkeypatch.setattr(batch, "step", lambda: steps.acquire(timeout=PATIENCE_MS / 1000) and step())
    site.service.adopt(Policy(limits=Limits(default_max_tokens=900)))
    page = open_page(site)
    expect(page.locator("#model")).to_have_text("tiny")
    page.keyboard.type("Hi\n")
    answer = page.locator(".assistant")
    expect(answer).to_have_text(re.compile(".{20,}", re.DOTALL), timeout=PATIENCE_MS)
    before = len(answer.text_content())
    steps.release(400)
    expect(answer).to_have_text(re.compile(f".{{{before + 1},}}", re.DOTALL), timeout=PATIENCE_MS)
    page.keyboard.press("Escape")
    expect(page.locator(".wrong")).to_have_text("stopped")
    steps.release(900)
    deadline = time.monotonic() + 30
    while site.backend.engine.stats().running:
        assert time.monotonic() < deadline, "the slot is not freed"
        time.sleep(0.01)
    site.service.adopt(site.policy)


def test_a_conversation_is_begun_anew_about_the_same_picture(site: Site, open_page: Any) -> None:
    site.service.adopt(Policy(limits=Limits(default_max_tokens=900)))
    page = open_page(site)
    expect(page.get_by_role("button", name="Start over")).to_be_hidden()
    page.set_input_files("#files", pictures(4))
    ask(page, "What is it?")
    expect(page.locator(".assistant")).to_have_text(re.compile("."), timeout=PATIENCE_MS)
    page.get_by_role("button", name="Start over").click()  # also while it is answered
    expect(page.locator(".turn, .wrong, .figures")).to_have_count(0)
    expect(page.get_by_role("button", name="Ask")).to_be_visible()
    site.service.adopt(site.policy)
    site.backend.prompts.clear()
    page.keyboard.type("And what is this?\n")
    wait_for_answers(page, 1)
    expect(page.locator(".user")).to_have_text(["And what is this?"])
    [prompt] = site.backend.prompts
    assert prompt.pixel_values is not None
    [alone] = site.backend.engine.generate([prompt])
    assert page.locator(".assistant").text_content() == alone.text


def test_an_answer_that_is_cut_off_is_shown_as_such(site: Site, open_page: Any) -> None:
    """By a proxy between them, say, that ends the response in good form."""
    page = open_page(site)
    expect(page.locator("#model")).to_have_text("tiny")
    choice = {"index": 0, "delta": {"content": "It is"}, "finish_reason": None}
    event = json.dumps({"choices": [choice], "usage": None})
    page.route(
        "**/chat/completions",
        lambda route: route.fulfill(content_type="text/event-stream", body=f"data: {event}\n\n"),
    )
    page.keyboard.type("What is it?\n")
    expect(page.get_by_role("alert")).to_contain_text("the answer was cut off")
    expect(page.locator(".assistant")).to_have_text("It is")
    expect(page.locator(".figures")).to_have_count(0)


def test_an_empty_answer_is_seen_and_not_sent_as_something_else(site: Site, open_page: Any) -> None:
    page = open_page(site)
    expect(page.locator("#model")).to_have_text("tiny")
    bodies: list[Any] = []

    def answer_nothing(route: Any) -> None:
        bodies.append(route.request.post_data_json)
        choice = {"index": 0, "delta": {}, "finish_reason": "stop"}
        event = json.dumps({"choices": [choice], "usage": {"completion_tokens": 0}})
        route.fulfill(content_type="text/event-stream", body=f"data: {event}\n\ndata: [DONE]\n\n")

    page.route("**/chat/completions", answer_nothing)
    for count in (1, 2):
        page.keyboard.type("What is it?\n")
        wait_for_answers(page, count)
    expect(page.locator(".assistant")).to_have_text(["\u2026", "\u2026"])
    assert "\u2026" not in json.dumps(bodies, ensure_ascii=False)


def test_on_a_phone_nothing_is_cut_off(site: Site, open_page: Any) -> None:
    page = open_page(site, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True, color_scheme="dark")
    page.set_input_files("#files", pictures(3))
    page.locator("#question").fill("A question that is quite a bit longer than the screen of a phone is wide?")
    page.get_by_role("button", name="Ask").tap()
    wait_for_answers(page, 1)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for name in ("Picture", "Ask", "Start over"):
        box = page.get_by_role("button", name=name, exact=True).bounding_box()
        assert box["height"] >= 44  # what a thumb hits
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
        assert box["y"] + box["height"] <= 640
    page.screenshot(path=SCREENSHOTS / "page-phone.png")


def test_a_question_that_is_too_long_by_itself_costs_no_other(site: Site, open_page: Any) -> None:
    site.service.adopt(Policy(limits=Limits(max_prompt_tokens=160, default_max_tokens=30)))
    page = open_page(site)
    ask(page, "What is it?")
    wait_for_answers(page, 1)
    ask(page, "many words " * 100)
    expect(page.get_by_role("alert")).to_contain_text("at most 160")
    ask(page, "What is it now?")
    wait_for_answers(page, 2)
    assert "without" not in page.locator(".figures").last.text_content()
    site.service.adopt(site.policy)


def test_a_conversation_that_has_become_too_long_goes_on_without_its_beginning(site: Site, open_page: Any) -> None:
    site.service.adopt(Policy(limits=Limits(max_prompt_tokens=160, default_max_tokens=30)))
    site.backend.prompts.clear()
    page = open_page(site)
    page.set_input_files("#files", pictures(0))
    expect(page.locator("#talk > img")).to_be_visible()
    for count in range(1, 7):
        ask(page, f"What is number {count}?")
        wait_for_answers(page, count)
    assert "without" not in page.locator(".figures").first.text_content()
    assert re.search(r"without the first \d questions$", page.locator(".figures").last.text_content())
    assert all(prompt.pixel_values is not None for prompt in site.backend.prompts)
    expect(page.locator(".user")).to_have_count(6)
    site.service.adopt(site.policy)


@pytest.mark.parametrize("kind", ["GIF", "PNG"])
def test_transparency_shows_grey_also_in_pictures_that_the_page_writes_anew(
    site: Site, open_page: Any, kind: str
) -> None:
    site.backend.prompts.clear()
    clear = Image.new("P", (40, 30)) if kind == "GIF" else Image.new("RGBA", (12_004, 70))  # too long a side
    buffer = io.BytesIO()
    clear.save(buffer, kind, **({"transparency": 0} if kind == "GIF" else {}))
    page = open_page(site)
    page.set_input_files("#files", [{"name": "a", "mimeType": f"image/{kind.lower()}", "buffer": buffer.getvalue()}])
    expect(page.locator("#talk > img")).to_be_visible()
    page.locator("#question").fill("What color is it?")
    page.locator("#question").press("Enter")
    wait_for_answers(page, 1)
    [prompt] = site.backend.prompts
    assert prompt.pixel_values.min() >= 126 and prompt.pixel_values.max() <= 128


def test_a_token_is_asked_for_and_errors_are_shown(site: Site, open_page: Any) -> None:
    site.service.adopt(Policy(limits=Limits(max_prompt_tokens=70), tokens={"me": hash_token("secret")}))
    page = open_page(site)
    page.get_by_label("Token").fill("secret")
    page.get_by_role("button", name="Use").click()
    expect(page.locator("#model")).to_have_text("tiny")
    expect(page.get_by_label("Token")).to_be_hidden()
    page.locator("#question").fill("many words " * 60)
    page.locator("#question").press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("at most 70")
    page.locator("#question").fill("Hi")
    page.locator("#question").press("Enter")
    wait_for_answers(page, 1)
    site.service.adopt(site.policy)
