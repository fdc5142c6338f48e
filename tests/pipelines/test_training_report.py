"""The report of a training run, made from a run's folder."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from flashsloth import FlashSlothProcessor
from jobs.report import main as report_job
from pipelines import storage
from pipelines.report.run_figures import stalls_of, time_uses, windows_of
from pipelines.report.run_history import history_of
from pipelines.report.run_page import write_run_report
from pipelines.report.run_panels import panels_of, thinned
from pipelines.report.run_sources import run_report
from pipelines.shards.manifest import Manifest
from pipelines.training.recording import recorded, shortened
from pipelines.training.scores import Measure, Score, ScoreLog
from tests.pipelines.test_report import Page
from tests.prepared import coloured_rows, write_prepared

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
START = 1_760_000_000.0
STALLED, SAVING = 50, 80
Event = dict[str, Any]


def event(seconds: float, kind: str, who: str = "worker", **facts: Any) -> Event:
    return {"time": START + seconds, "kind": kind, "who": who, **facts}


def attempt(seconds: float, step: int, world_size: int = 4, reached: int = 0, **facts: Any) -> Event:
    machines = [[f"node-{rank // 2}", "NVIDIA H100"] for rank in range(world_size)]
    peak = {"tflops": 989.0, "source": "stated by the maker of the H100"}
    known = {"num_steps": 100, "reached": max(step, reached), "peak": peak, "data": ["0123"], "environment": {}}
    return event(seconds, "attempt", step=step, world_size=world_size, machines=machines, **(known | facts))


def line(step: int, **changes: float) -> dict[str, float]:
    """Ten steps of two seconds each."""
    figures = {
        "step": step,
        "time": START + 10 + 2 * step,
        "loss": 3 * math.exp(-step / 30),
        "seconds_per_step": 2.0,
        "samples_per_s": 64.0,
        "tokens_per_s": 25_000.0,
        "data_wait_share": 0.01,
        "data_wait_share_max": 0.015,
        "padding_share": 0.04,
        "checkpoint_s": 0.0,
        "memory_gib": 61.5,
        "tflops_vision": 40.0,
        "tflops_language": 400.0,
        "mfu_vision": 0.04,
        "mfu_language": 0.40,
        "mfu": 0.44,
        "grad_norm": 1.0,
        "lr": 2e-5,
        "lr_vision_tower": 2e-6,
        "epoch": step / 100,
        "samples_seen": step * 128,
        "seconds_left": 2.0 * (100 - step),
    }
    return figures | changes


def lines() -> Iterator[dict[str, float]]:
    for step in range(10, 101, 10):
        changes = {STALLED: {"seconds_per_step": 5.0, "data_wait_share": 0.6}, SAVING: {"checkpoint_s": 4.0}}
        yield line(step, **changes.get(step, {}))


HUNG = "no step of this run has moved for 900 s: rank 3 hangs at <reader.py>:88"
EVENTS = [
    event(0, "started", "driver", host="head", process=1),
    attempt(10, 0),
    event(50, "saved", step=20, name="step-00000020-aaaa"),
    event(70, "lost", "controller", message="lost rank 2 on node-1 (its node has died); 3 more stopped with it"),
    attempt(90, 20, world_size=2, reached=30),
    event(150, "hung", "watchdog", message=HUNG),
    event(152, "lost", "controller", message="lost rank 0 on node-0, rank 1 on node-0 (exit code 76)"),
    attempt(160, 60),
    event(230, "ended", "driver", outcome="finished", message=""),
]


def write_run(folder: Path | str, data: str = "/nowhere/data", events: list[Event] | None = None) -> str:
    uri = str(folder)
    settings = {"data": {"folders": [data]}, "run": {"name": "run <b>"}}
    storage.write_bytes(f"{uri}/config.yaml", yaml.safe_dump(settings).encode())
    storage.write_bytes(f"{uri}/metrics.jsonl", "".join(json.dumps(each) + "\n" for each in lines()).encode())
    told = EVENTS if events is None else events
    storage.write_bytes(f"{uri}/events/one.jsonl", "".join(json.dumps(each) + "\n" for each in told).encode())
    return uri


# What happened


def test_restarts_are_told_with_their_causes() -> None:
    history = history_of(EVENTS)
    assert [each.why for each in history.attempts] == [EVENTS[3]["message"], HUNG, "finished"]
    assert [each.is_failure for each in history.attempts] == [True, True, False]
    assert [(each.step, each.reached, each.world_size) for each in history.attempts] == [
        (0, 0, 4),
        (20, 30, 2),
        (60, 60, 4),
    ]
    assert (history.state, history.restarts, history.seconds, list(history.saved)) == ("finished", 2, 230, [20])
    assert any("exit code 76" in what for _, _, what in history.notes), "nothing that was told is lost"


def test_a_job_that_was_killed_is_told_from_one_that_was_stopped() -> None:
    killed = [event(0, "started", "driver", host="a", process=1), attempt(10, 0), event(40, "note", message="x")]
    again = [event(1000, "started", "driver", host="a", process=2), attempt(1010, 20, world_size=2)]
    history = history_of([*killed, *again], last_logged=START + 1030)
    assert history.attempts[0].why.startswith("the job ended without a word")
    assert history.state == "running" and history.attempts[1].ended is None
    assert history.seconds == 40 + 30, "the time between the two jobs is nobody's"
    stop = event(1040, "ended", "driver", outcome="stopped", message="stopped at step 30 of 100")
    history = history_of([*killed, *again, stop])
    assert (history.state, history.message) == ("stopped", "stopped at step 30 of 100")
    assert not history.attempts[1].is_failure


def test_an_elastic_run_says_that_it_grew() -> None:
    history = history_of([event(0, "started", "driver", host="a", process=1), attempt(1, 0, 2), attempt(60, 20, 4)])
    assert history.attempts[0].why == "the number of workers changed from 2 to 4"
    assert not history.attempts[0].is_failure


# What the figures say


def test_windows_begin_where_attempts_do() -> None:
    found = windows_of([line(10), line(20), line(30), line(40)], history_of([attempt(0, 0), attempt(50, 25, 2)]))
    assert [(each.first, each.last) for each in found] == [(1, 10), (11, 20), (26, 30), (31, 40)]
    assert [each.world_size for each in found] == [4, 4, 2, 2]
    assert [each.starts_attempt for each in found] == [True, False, True, False]
    assert found[2].seconds == pytest.approx(10.0)


def test_stalls_are_found_and_fewer_workers_are_none() -> None:
    history = history_of(EVENTS)
    (stall,) = stalls_of(windows_of(list(lines()), history))
    assert (stall.window.first, stall.window.last, stall.lost) == (41, 50, pytest.approx(30.0))
    assert stall.cause == "waited for data 60% of the time"
    halved = [line(step, seconds_per_step=4.0 if 20 < step <= 60 else 2.0) for step in range(10, 101, 10)]
    assert stalls_of(windows_of(halved, history)) == []
    spoiled = [line(step, seconds_per_step=9.0 if step == 90 else 2.0) for step in range(10, 101, 10)]
    assert [each.cause for each in stalls_of(windows_of(spoiled, history))] == [
        "neither data nor a checkpoint: look at the machines"
    ]


def test_the_time_adds_up() -> None:
    history = history_of(EVENTS)
    uses = {use.name: use.seconds for use in time_uses(windows_of(list(lines()), history), history)}
    assert sum(uses.values()) == pytest.approx(history.seconds)
    assert uses["waiting for checkpoints"] == 4.0
    assert uses["waiting for data"] == pytest.approx(9 * 20 * 0.01 + 50 * 0.6)


def test_every_figure_gets_a_curve_known_or_not() -> None:
    panels = panels_of([*lines(), {"step": 50, "eval_exact_match": 0.4}, {"step": 100, "eval_exact_match": 0.6}], [20])
    titles = [panel.title for panel in panels]
    assert titles == [
        *("Loss", "Learning rate", "Gradient norm", "Samples a second", "Tokens a second", "MFU", "Seconds a step"),
        *("Waiting for data", "Padding", "Memory, GiB", "Waiting for checkpoints, s", "Eval exact match"),
    ]
    assert panels[-1].note == "0.5 at the end, 0.4 to 0.6"
    assert [name for _, name in panels[5].keys] == ["both", "vision", "language"]
    assert "45 %" in panels[5].svg or "40 %" in panels[5].svg
    assert panels_of([line(10, loss=math.nan), line(20)], [])[0].note.startswith("1.54 at the end")


def test_evaluations_have_their_curves_and_the_best_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    measure = Measure(data=["0123"], max_rows=8, metric="exact_match", max_new_tokens=4)
    log = ScoreLog(run)
    for step, share in ((40, 0.25), (60, 0.75), (80, 0.5)):
        name = f"step-{step:08d}-aaaa"
        known = {"checkpoint": name, "manifest": "m", "measure": measure, "rows": 8, "loss_tokens": 99, "seconds": 1.0}
        log.add(Score(step=step, loss=1 / step, questions=8, exact_match=share, **known), is_best=False)
    report = run_report(run)
    assert [panel.title for panel in report.panels[-2:]] == ["Eval loss", "Eval exact match"]
    assert report.findings[-1][2] == "The best of 3 evaluated checkpoints is that of step 60: exact match 0.75."


def test_long_runs_are_thinned_without_losing_a_peak() -> None:
    values = [0.0] * 100_000
    values[54_321] = 7.0
    steps, kept = thinned(list(range(len(values))), values)
    assert len(steps) <= 802 and max(kept) == 7.0 and (steps[0], steps[-1]) == (0, 99_999)
    assert list(steps) == sorted(steps)


# The page


def test_the_page_shows_the_run_and_loads_nothing(tmp_path: Path, processor: FlashSlothProcessor) -> None:
    data = tmp_path / "prepared"
    write_prepared(data, coloured_rows(5), processor)
    manifest = Manifest.load(str(data)).identity()
    events = [each | ({"data": [manifest]} if each["kind"] == "attempt" else {}) for each in EVENTS]
    html = Path(write_run_report(write_run(tmp_path / "run", str(data), events))).read_text("utf-8")
    page = Page(html)
    assert page.open_tags == [] and not page.tags & {"script", "link", "iframe"}
    assert all(address.startswith("#") for address in page.loaded) and "url(http" not in html and "@import" not in html
    for text in (
        ">finished<",
        "100 of 100 steps in 3 min 50 s, on 4 workers (NVIDIA H100) on 2 machines.",
        "over the attempts 4, 2, 4",
        "rank 3 hangs at &lt;reader.py&gt;:88",
        "lost rank 2 on node-1 (its node has died)",
        "waited for data 60% of the time",
        "run &lt;b&gt;",
        "44.0%",
        "vision 4.0%, language 40.0%",
        "989 TFLOP/s, stated by the maker of the H100",
        "2 in all; attempts that failed: 2; steps done again: 10.",
        manifest,
    ):
        assert text in html, text
    assert "today" not in html, "the data is what the run read"


def test_data_that_changed_or_went_is_told(tmp_path: Path, processor: FlashSlothProcessor) -> None:
    data = tmp_path / "prepared"
    write_prepared(data, coloured_rows(5), processor)
    run = write_run(tmp_path / "run", str(data))
    facts = run_report(run).data[str(data)]
    assert facts["manifest"] == "0123" and facts["today"].startswith("another manifest, ")
    (data / "manifest.json").unlink()
    assert run_report(run).data[str(data)]["today"].startswith("cannot be read: ")


def test_a_run_that_never_took_a_step_has_a_report(tmp_path: Path) -> None:
    run = write_run(
        tmp_path / "run", events=[EVENTS[0], event(5, "ended", "driver", outcome="failed", message="no GPU")]
    )
    (tmp_path / "run" / "metrics.jsonl").unlink()
    html = Path(write_run_report(run)).read_text("utf-8")
    assert "No worker has begun yet." in html and "no GPU" in html and ">failed<" in html


def test_a_run_without_events_has_its_curves(tmp_path: Path) -> None:
    html = Path(write_run_report(write_run(tmp_path / "run", events=[]))).read_text("utf-8")
    assert "100 steps, and no record of its attempts." in html and html.count("<svg") == 11 and ">unknown<" in html


@pytest.mark.s3
def test_a_run_on_an_object_store_gets_its_report_there(s3_uri: str, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(f"{s3_uri}/runs/far")
    assert report_job(["--run", run]) == 0
    assert f"the report is {run}/report.html" in capsys.readouterr().out
    assert b">finished<" in storage.read_bytes(f"{run}/report.html")


def test_the_job_names_a_folder_that_holds_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_job(["--run", str(tmp_path / "none")]) == 1
    assert (
        f"there is no training run in {tmp_path}/none: {tmp_path}/none/config.yaml is missing"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("error", "outcome", "message"),
    [
        (None, "finished", ""),
        (KeyboardInterrupt(), "stopped", "KeyboardInterrupt"),
        (RuntimeError("worker 1 failed: Traceback\n  File x\n\nValueError: too hot\n"), "failed", "too hot"),
    ],
)
def test_however_a_job_ends_it_leaves_a_report(
    tmp_path: Path, error: BaseException | None, outcome: str, message: str
) -> None:
    run = write_run(tmp_path / "run", events=[])
    if error:
        with pytest.raises(type(error)), recorded(run, stopped=(KeyboardInterrupt,)):
            raise error
    else:
        with recorded(run, stopped=(KeyboardInterrupt,)):
            pass
    history = run_report(run).history
    assert history.state == outcome and message in history.message
    assert f">{outcome}<" in (tmp_path / "run" / "report.html").read_text("utf-8")


def test_a_report_that_cannot_be_made_fails_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("no JSON\n")
    with recorded(run, stopped=()):
        pass
    assert "could not be written" in capsys.readouterr().out


def test_errors_keep_their_first_and_last_line() -> None:
    assert shortened(ValueError("one\n\n trace\nlast")) == "one ... last"
    assert shortened(KeyError()) == "KeyError"


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found (on Debian and Ubuntu: apt-get install chromium)")
def test_a_browser_asks_for_nothing_else_and_a_phone_need_not_scroll_sideways(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    address = f"file://{write_run_report(write_run(tmp_path / 'run'))}"
    asked: list[str] = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"], timeout=60_000)
        page = browser.new_page(viewport={"width": 390, "height": 800})
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.locator("svg").count() == 11
        assert page.locator("svg").first.bounding_box()["width"] > 200  # type: ignore[index]
        browser.close()
    assert asked == [address]


def test_the_report_of_a_long_run_is_quick(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    many = [line(step, loss=2 + math.sin(step)) for step in range(10, 100_001, 10)]
    storage.write_bytes(f"{run}/metrics.jsonl", "".join(json.dumps(each) + "\n" for each in many).encode())
    write_run_report(run)
    started = time.process_time()
    write_run_report(run)
    assert time.process_time() - started < 5
    assert (tmp_path / "run" / "report.html").stat().st_size < 2_000_000
