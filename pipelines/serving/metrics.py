"""What the service measures, as Prometheus reads it. Each replica counts for itself; `GET /metrics` shows them all."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Metric, generate_latest

from pipelines.serving.engine import EngineStats

PREFIX = "flashsloth"
_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)
_ENGINE = {  # field of `EngineStats` -> what it says; counts where the name ends in _total
    "waiting": ("queue", "Requests that wait for a slot"),
    "running": ("slots_used", "Requests that are being answered"),
    "slots": ("slots", "Requests that can be answered at once"),
    "batch_size": ("batch_size", "Rows of the last decode step"),
    "prefill_tokens": ("prefill_tokens_total", "Prompt tokens read"),
    "generated_tokens": ("generated_tokens_total", "Answer tokens made"),
    "images_encoded": ("images_encoded_total", "Images encoded"),
    "image_cache_hits": ("image_cache_hits_total", "Images that were asked for and had not to be encoded"),
    "image_cache_bytes": ("image_cache_bytes", "Memory of encoded images"),
}


class IngressMetrics:
    """What one ingress has seen."""

    def __init__(self, replica: str) -> None:
        self.registry = CollectorRegistry()
        self._replica = replica
        ours, at = ["replica"], self.registry
        self._requests = Counter(f"{PREFIX}_requests", "Requests by status", [*ours, "status"], registry=at)
        self._open = Gauge(f"{PREFIX}_open_requests", "Requests that have not ended", ours, registry=at)
        self._tokens = Counter(f"{PREFIX}_tokens", "Tokens of answered requests", [*ours, "kind"], registry=at)
        self._retries = Counter(f"{PREFIX}_retries", "Times that another engine was asked", ours, registry=at)
        first, text = (
            f"{PREFIX}_time_to_first_token_seconds",
            "From a request's arrival to the first text of its answer",
        )
        self._first = Histogram(first, text, ours, buckets=_SECONDS, registry=at)
        whole, text = f"{PREFIX}_request_seconds", "From a request's arrival to its end"
        self._whole = Histogram(whole, text, ours, buckets=_SECONDS, registry=at)

    def opened(self) -> None:
        """A request has come."""
        self._open.labels(self._replica).inc()

    def closed(self, status: int, seconds: float) -> None:
        """A request has ended; 499 stands for a client that went away."""
        self._open.labels(self._replica).dec()
        self._requests.labels(self._replica, str(status)).inc()
        self._whole.labels(self._replica).observe(seconds)

    def turned_away(self, status: int) -> None:
        """A request was refused at the door: for its token, its client's rate, or because too many are open."""
        self._requests.labels(self._replica, str(status)).inc()

    def first_token(self, seconds: float) -> None:
        """An answer has begun."""
        self._first.labels(self._replica).observe(seconds)

    def answered(self, prompt_tokens: int, generated_tokens: int) -> None:
        """An answer is complete."""
        self._tokens.labels(self._replica, "prompt").inc(prompt_tokens)
        self._tokens.labels(self._replica, "generated").inc(generated_tokens)

    def retried(self) -> None:
        """An engine was lost before it had sent a token, or was full, and another one is asked."""
        self._retries.labels(self._replica).inc()

    def collect(self) -> list[Metric]:
        """All of it, in a form that crosses processes."""
        return list(self.registry.collect())


class EngineMetrics:
    """What one engine does."""

    def __init__(self, replica: str) -> None:
        self._replica = replica
        self._before = (time.monotonic(), 0)
        self._rate = 0.0

    def collect(self, stats: EngineStats) -> list[Metric]:
        """The engine's figures of now, in a form that crosses processes."""
        now, made = time.monotonic(), stats.generated_tokens
        then, made_before = self._before
        if now - then >= 1:  # two readers at the same time must not leave each other an interval of nothing
            self._rate = (made - made_before) / (now - then)
            self._before = (now, made)
        values = dataclasses.asdict(stats)
        metrics = [self._metric(name, text, values[field]) for field, (name, text) in _ENGINE.items()]
        share = stats.running / stats.slots
        metrics.append(self._metric("kv_cache_used_ratio", "Share of the slots for keys and values in use", share))
        metrics.append(self._metric("tokens_per_second", "Answer tokens made, since the last look", self._rate))
        return metrics

    def _metric(self, name: str, text: str, value: float) -> Metric:
        is_count = name.endswith("_total")
        metric = Metric(f"{PREFIX}_engine_{name.removesuffix('_total')}", text, "counter" if is_count else "gauge")
        metric.add_sample(f"{PREFIX}_engine_{name}", {"replica": self._replica}, value)
        return metric


def exposition(groups: Iterable[list[Metric]]) -> bytes:
    """The metrics of several replicas as one text: each name once, with the samples of all."""
    merged: dict[str, Metric] = {}
    for metric in (metric for group in groups for metric in group):
        if metric.name in merged:
            merged[metric.name].samples.extend(metric.samples)
        else:
            merged[metric.name] = metric
    return generate_latest(_Collected(list(merged.values())))


class _Collected(CollectorRegistry):
    """A registry of what was collected elsewhere."""

    def __init__(self, metrics: list[Metric]) -> None:
        super().__init__()
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return iter(self._metrics)
