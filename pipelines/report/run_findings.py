"""What a run's figures mean, in a few sentences: is it healthy, and what makes it slow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipelines.report.contents import Stage
from pipelines.report.curves import short
from pipelines.report.findings import describe_stage
from pipelines.report.run_contents import Headline, History, Stall, Window
from pipelines.report.run_figures import median
from pipelines.report.templates import duration
from pipelines.training.scores import Score, best_of

Finding = tuple[str, str, str]
_WAITS_LITTLE, _PADS_MUCH, _SAVES_MUCH = 0.02, 0.1, 0.05


def headlines_of(windows: Sequence[Window], history: History) -> list[Headline]:
    """The numbers that one looks for first."""
    if not windows:
        return []
    tail = windows[-max(1, len(windows) // 20) :]
    steps = tail[-1].last - tail[0].first + 1
    found = [Headline(f"{median(tail, 'loss'):.4g}", "loss", f"over the last {steps} steps")]
    found.append(Headline(short(median(windows, "samples_per_s")), "samples a second", "median"))
    found.append(Headline(short(median(windows, "tokens_per_s")), "tokens a second", "median"))
    if "mfu" in windows[-1].figures:
        vision, language = median(windows, "mfu_vision"), median(windows, "mfu_language")
        note = f"vision {vision:.1%}, language {language:.1%}"
        found.append(Headline(f"{median(windows, 'mfu'):.1%}", "MFU", note))
    found.append(Headline(f"{_mean(windows, 'data_wait_share'):.1%}", "of the time waiting for data"))
    found.append(Headline(f"{_mean(windows, 'padding_share'):.1%}", "of the positions padding"))
    found.append(Headline(f"{max(w.figures['memory_gib'] for w in windows):.1f} GiB", "memory", "fullest worker"))
    return [*found, Headline(str(history.restarts), "restarts" if history.restarts != 1 else "restart")]


def findings_of(windows: Sequence[Window], stalls: Sequence[Stall], history: History) -> list[Finding]:
    """Subject, verdict (good, bad, plain) and sentence."""
    found: list[Finding] = []
    if windows:
        steps, losses = [w.last for w in windows], [w.figures["loss"] for w in windows]
        found.append(("loss", "plain", describe_stage(Stage("run", steps, losses))))
        found += [_waiting(windows), _padding(windows), _saving(windows)]
    found += _stalls(stalls)
    found.append(_restarts(history))
    return found


def evaluation_of(scores: Sequence[Score]) -> list[Finding]:
    """Which checkpoint was best on the split that was held out; nothing where none was evaluated."""
    best = best_of(score for score in scores if score.measure == scores[-1].measure)
    if best is None:
        return []
    metric = best.measure.metric.replace("_", " ")
    sentence = (
        f"The best of {len(scores)} evaluated checkpoints is that of step {best.step:,}: {metric} {best.value:.4g}."
    )
    return [("evaluation", "plain", sentence)]


def _waiting(windows: Sequence[Window]) -> Finding:
    share, worst = _mean(windows, "data_wait_share"), _mean(windows, "data_wait_share_max")
    if max(share, worst) <= _WAITS_LITTLE:
        return "data", "good", f"Steps hardly wait for data: {share:.1%} of their time. The model sets the pace."
    return (
        "data",
        "bad",
        f"Steps wait for data {share:.1%} of their time, on the slowest worker {worst:.1%}. More data.reader_threads "
        "or data.prefetch, or a data.cache_dir on a fast disk, would make it faster.",
    )


def _padding(windows: Sequence[Window]) -> Finding:
    share = _mean(windows, "padding_share")
    if share <= _PADS_MUCH:
        return "padding", "good", f"{share:.1%} of the positions are padding."
    remedy = "batch.max_tokens with batch.pack_to would leave hardly any"
    return "padding", "bad", f"{share:.1%} of the positions are padding: {remedy}."


def _saving(windows: Sequence[Window]) -> Finding:
    spent, total = sum(w.figures.get("checkpoint_s", 0.0) for w in windows), sum(w.seconds for w in windows)
    verdict = "bad" if spent > _SAVES_MUCH * total else "good"
    remedy = " A larger run.checkpoint_every would cost less." if verdict == "bad" else ""
    return "checkpoints", verdict, f"Steps waited {duration(spent)} for checkpoints, {spent / total:.1%}.{remedy}"


def _stalls(stalls: Sequence[Stall]) -> list[Finding]:
    later = [stall for stall in stalls if not stall.window.starts_attempt]
    if not later:
        return [("stalls", "good", "No stretch of steps was far slower than the others, but for starts.")]
    lost = sum(stall.lost for stall in later)
    return [("stalls", "bad", f"{len(later)} stretches of steps were far slower; they cost {duration(lost)}.")]


def _restarts(history: History) -> Finding:
    failures = [attempt for attempt in history.attempts if attempt.is_failure]
    again = sum(max(0, attempt.reached - attempt.step) for attempt in history.attempts)
    if not history.restarts and not failures:
        return "restarts", "good", "None: one attempt from start to end."
    sentence = f"{history.restarts} in all; attempts that failed: {len(failures)}; steps done again: {again:,}."
    return "restarts", "bad" if failures else "plain", sentence


def _mean(windows: Sequence[Window], name: str) -> float:
    """Over time, not over windows."""
    having: list[tuple[Mapping[str, float], float]] = [(w.figures, w.seconds) for w in windows if name in w.figures]
    total = sum(seconds for _, seconds in having)
    return sum(figures[name] * seconds for figures, seconds in having) / total if total else 0.0
