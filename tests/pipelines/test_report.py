import io
import re
import subprocess
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flashsloth import FlashSlothProcessor
from pipelines.evaluation.verdicts import AnsweredQuestion, write_evaluation
from pipelines.report.contents import Goal, Picture, Reply, Report, Stage, Step, TypeScore, score_replies
from pipelines.report.curves import loss_curve, running_mean
from pipelines.report.findings import describe_stage, judge, margin
from pipelines.report.interview import wait_until_healthy
from pipelines.report.page import render, write_report
from pipelines.report.sources import data_facts, pictures_of, replies_of, stage_of
from pipelines.report.summary import summarize
from pipelines.report.templates import duration
from pipelines.serving.transport import free_port
from pipelines.shards.manifest import Manifest
from pipelines.training.environment import environment_facts
from tests.prepared import coloured_rows, write_prepared

VOID_TAGS = {"meta", "img", "link", "br", "hr", "input", "path", "use", "rect"}
STAGE = Stage("alignment", range(1, 101), [5 * 0.96**i + 0.3 for i in range(100)], note="Captions.")


def replies(answers: Sequence[str], truths: Sequence[str], question_type: str = "color") -> list[Reply]:
    return [
        Reply(f"question {i}?", said, truth, said == truth, question_type)
        for i, (said, truth) in enumerate(zip(answers, truths, strict=True))
    ]


def score(accuracy: float, blank: float = 0.2, majority: float = 0.25, num_questions: int = 400) -> TypeScore:
    return TypeScore("color", num_questions, accuracy, blank, majority, mistake=("red", "blue", 3))


def report(goal: float = 80.0, said: str = "red") -> Report:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 30), "red").save(buffer, "JPEG")
    answers = replies([said, "blue"], ["red", "green"])
    overall, scores = score_replies(answers, replies(["blue", "blue"], ["red", "green"]))
    picture = Picture("heldout-00000", buffer.getvalue(), answers)
    return Report(
        title="Quickstart",
        summary="A summary.",
        goals=[Goal("points right", goal, 100 * overall.accuracy)],
        steps=[
            Step("align", "python jobs/train.py --config tiny.yaml", 65.4),
            Step("serve", "python jobs/serve.py", 2),
        ],
        stages=[STAGE],
        overall=overall,
        scores=scores,
        pictures=[picture],
        failures=[picture],
        served=[picture],
        data={"captions": {"manifest": "0123abcd"}},
        settings={"align.yaml": "lr: 0.001"},
        environment={"torch": "2.13.0"},
    )


class Page(HTMLParser):
    """Collects what a browser would load, and checks that tags are closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.open_tags: list[str] = []
        self.tags: set[str] = set()
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID_TAGS:
            self.open_tags.append(tag)
        self.loaded += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset", "data")]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID_TAGS:
            self.open_tags.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID_TAGS:
            assert self.open_tags.pop() == tag


def test_page_needs_nothing_from_outside() -> None:
    html = render(report())
    page = Page(html)
    assert page.open_tags == []
    assert "script" not in page.tags and "link" not in page.tags
    assert len(page.loaded) >= 3, "the pictures are in the page"
    assert all(address.startswith(("data:image/", "#")) for address in page.loaded), page.loaded
    assert "url(http" not in html and "@import" not in html


def test_page_holds_what_it_was_given() -> None:
    html = render(report())
    for text in (
        "Quickstart",
        "python jobs/train.py --config tiny.yaml",
        "1 min 05 s",
        "1 min 07 s",  # the total
        "50.0 %",
        "0123abcd",
        "lr: 0.001",
        "2.13.0",
        "right: green",
        "not met: at least 80 wanted",
    ):
        assert text in html, text
    assert html.count('class="mark right"') == html.count('class="mark wrong"') == 3
    assert "met: at least 40 wanted" in render(report(goal=40)) and "not met" not in render(report(goal=40))


def test_answers_of_the_model_stay_text() -> None:
    html = render(report(said="<script>alert(1)</script>"))
    assert "<script" not in html and "&lt;script&gt;" in html


def test_write_report_leaves_only_the_page(tmp_path: Path) -> None:
    write_report(report(), tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_scores_count_right_answers_per_type() -> None:
    truths = ["red", "red", "blue", "green"]
    both = replies(["red", "blue", "blue", "blue"], truths) + replies(["yes", "no"], ["yes", "no"], "existence")
    blank = replies(["red"] * 4, truths) + replies(["no", "no"], ["yes", "no"], "existence")
    overall, (color, existence) = score_replies(both, blank)
    assert (color.accuracy, color.blank, color.majority, color.num_questions) == (0.5, 0.5, 0.5, 4)
    assert (existence.accuracy, existence.blank, existence.majority) == (1.0, 0.5, 0.5)
    assert color.mistake in {("blue", "red", 1), ("blue", "green", 1)} and existence.mistake is None
    assert overall.num_questions == 6
    assert overall.accuracy == pytest.approx(4 / 6) and overall.blank == pytest.approx(3 / 6)
    assert overall.majority == pytest.approx(3 / 6)


def test_scores_refuse_runs_that_do_not_belong_together() -> None:
    with pytest.raises(ValueError, match=r"2 with pictures, 1 with blank"):
        score_replies(replies(["a", "b"], ["a", "b"]), replies(["a"], ["a"]))
    with pytest.raises(ValueError, match="no replies"):
        score_replies([], [])


@pytest.mark.parametrize(
    ("accuracy", "verdict"), [(0.97, "learned"), (0.65, "partly learned"), (0.40, "not learned"), (0.26, "not learned")]
)
def test_verdict_follows_the_distance_to_the_better_baseline(accuracy: float, verdict: str) -> None:
    assert judge(score(accuracy)).verdict == verdict


def test_a_high_figure_close_to_its_baseline_is_not_called_learned() -> None:
    finding = judge(score(0.92, blank=0.90, num_questions=50))
    assert finding.verdict == "not learned"
    assert "92% right, against 90% with a blank picture" in finding.sentence
    assert judge(score(0.9, blank=0.2, majority=0.88, num_questions=50)).verdict == "not learned"


def test_margin_is_the_wilson_interval() -> None:
    """Against the roots of (p - q)^2 = z^2 q (1 - q) / n, which define it."""
    for share, count in ((0.8, 100), (0.5, 30), (1.0, 20), (0.0, 7)):
        low, high = sorted(
            np.roots([1 + 1.96**2 / count, -(2 * share + 1.96**2 / count), share**2]).real  # solved for q
        )
        assert margin(share, count) == pytest.approx((high - low) / 2, rel=1e-9)


def test_stage_is_described_by_its_figures() -> None:
    assert re.fullmatch(r"The loss fell from 4\.49 to 0\.406 over 100 steps\.", describe_stage(STAGE))
    rising = Stage("up", [1, 2], [1.0, 2.0])
    assert describe_stage(rising) == "The loss did not fall: from 1 to 2 over 2 steps."
    assert describe_stage(Stage("none", [], [])) == "No step was recorded."


def test_stage_refuses_curves_with_holes() -> None:
    with pytest.raises(ValueError, match="2 steps and 1 losses"):
        Stage("alignment", [1, 2], [0.5])


def test_running_mean_matches_the_obvious_loop() -> None:
    values = np.random.default_rng(0).normal(size=200)
    expected = [values[max(0, i - 5) : i + 6].mean() for i in range(200)]
    np.testing.assert_allclose(running_mean(values), expected)
    assert running_mean([3.0]).tolist() == [3.0] and running_mean([]).size == 0


def test_curve_follows_the_page_and_is_reproducible() -> None:
    svg = loss_curve(STAGE)
    assert svg.startswith("<svg role") and "viewBox" in svg
    assert "var(--accent)" in svg and "var(--muted)" in svg
    assert not re.search(r"#0[1-4]0[1-4]0[1-4]", svg)
    assert not re.match(r'<svg [^>]*\bwidth="', svg)
    assert loss_curve(STAGE) == svg
    assert not set(re.findall(r'id="(\w{10,})"', svg)) & set(
        re.findall(r'id="(\w{10,})"', loss_curve(Stage("tuning", STAGE.steps, STAGE.losses)))
    ), "two curves on a page must not share clip paths"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.84, "0.8 s"), (42.4, "42 s"), (187.2, "3 min 07 s"), (3599.9, "1 h 00 min"), (22500, "6 h 15 min")],
)
def test_durations_are_readable(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_sources_read_what_the_jobs_left(tmp_path: Path, processor: FlashSlothProcessor) -> None:
    folder = tmp_path / "prepared"
    write_prepared(folder, coloured_rows(5), processor)
    facts = data_facts(folder)
    assert facts["rows"] == "5 of 5" and facts["manifest"] == Manifest.load(str(folder)).identity()
    assert facts["processor"] == processor.identity()
    (tmp_path / "metrics.jsonl").write_text('{"step": 10, "loss": 2.5}\n{"step": 20, "loss": 1.5}\n')
    stage = stage_of("Alignment", tmp_path, "Captions.")
    assert (list(stage.steps), list(stage.losses)) == ([10, 20], [2.5, 1.5])
    answer = AnsweredQuestion("k", "heldout-00000", 0, "Where?", "position", "top\u2028", "top left", correct=False)
    write_evaluation(str(tmp_path / "evaluation"), [answer], {})
    assert replies_of(tmp_path / "evaluation") == [
        ("heldout-00000", Reply("Where?", "top\u2028", "top left", False, "position"))
    ]
    assert environment_facts()["torch"] == torch.__version__


def test_pictures_gather_their_replies_in_order(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.jpg").write_bytes(name.encode())
    first, second, third = replies(["red", "blue", "red"], ["red"] * 3)
    pictures = pictures_of([("b", first), ("a", second), ("b", third)], tmp_path)
    assert [(p.name, p.data, list(p.replies)) for p in pictures] == [("b", b"b", [first, third]), ("a", b"a", [second])]


def test_waiting_for_a_server_that_died_says_so() -> None:
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as server:
        server.wait()
        with pytest.raises(OSError, match="ended with status 3 before it answered at http://127"):
            wait_until_healthy(server, f"http://127.0.0.1:{free_port()}", patience_s=30)


def test_waiting_for_a_server_ends() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as server:
        with pytest.raises(OSError, match=r"no answer at .*/health within 0.3 s"):
            wait_until_healthy(server, f"http://127.0.0.1:{free_port()}", patience_s=0.3)
        server.communicate(b"\n")


def test_summary_shows_times_accuracy_and_goals() -> None:
    score = TypeScore("color", 100, accuracy=0.81, blank=0.57, majority=0.3)
    report = Report(
        title="",
        summary="",
        goals=[Goal("% right", 80, 81), Goal("points above blank", 25, 24)],
        steps=[Step("align", "python", 65), Step("tune", "python", 70)],
        stages=[],
        overall=score,
        scores=[score],
        pictures=[],
        failures=[],
    )
    text = summarize(report, Path("report.html"))
    for part in ("2 min 15 s", "81.0%", "57.0%", "30.0%", "met: 81.0 % right", "NOT MET: 24.0 points", "report.html"):
        assert part in text, part
