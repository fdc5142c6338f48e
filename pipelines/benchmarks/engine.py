"""`jobs/benchmark.py engine`: the bare engine at full size on a GPU, with random weights in bf16.

Three figures, for base and for HD: the first text of a request that comes alone, its decode steps against the memory
bandwidth that reading the weights once per token takes, and requests per second when many come at once.
"""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import PositiveInt

from flashsloth import (
    FlashSlothConfig,
    FlashSlothForConditionalGeneration,
    FlashSlothProcessor,
)
from flashsloth.backbones import processor_fields
from pipelines.benchmarks.machine import describe_machine
from pipelines.benchmarks.rounds import timed
from pipelines.benchmarks.settings import BenchmarkSettings
from pipelines.benchmarks.sizes import full_size_processor
from pipelines.benchmarks.table import Bound, Report, Table
from pipelines.serving.engine import Encoder, Engine, EngineSettings, Prompt
from pipelines.serving.sampling import Sampling

_TOKENS = 128  # of an answer
_QUESTION = "What is in the picture?"


class EngineBenchmark(BenchmarkSettings):
    """The bare engine at full size on a GPU: 3.2B random parameters in bf16."""

    alone: PositiveInt = 40
    """Requests that come one after the other."""
    at_once: PositiveInt = 256
    """Requests that come at the same time."""
    seed: int = 0
    """Of weights and pictures."""


def measure_engine(settings: EngineBenchmark) -> Report:
    """Run the whole benchmark; with `quick` at the tiny size, on a GPU or not, where the figures mean nothing.

    Raises:
        ValueError: there is no GPU.
    """
    on_gpu = torch.cuda.is_available()
    if not (on_gpu or settings.quick):
        raise ValueError("the benchmark of the engine needs a GPU; --quick shows that it runs, tiny and on the CPU")
    if settings.quick:
        settings = settings.model_copy(update={"alone": 2, "at_once": 4})
    device = torch.device("cuda" if on_gpu else "cpu")
    bandwidth = measure_bandwidth(device)
    found = {tiling: _measure(settings, tiling, device) for tiling in ("base", "hd")}
    for each in found.values():
        each["bandwidth_share"] = each["bytes_per_token"] * each["tokens_per_s"] / bandwidth
    return Report(
        name="engine",
        machine=describe_machine(),
        settings=settings.model_dump(),
        tables=[_table(found, bandwidth)],
        bounds=[] if settings.quick else _bounds(found["base"]),
        measured={"engine": found | {"bandwidth": bandwidth}},
    )


def measure_bandwidth(device: torch.device) -> float:
    """Bytes per second that a large copy reads and writes: the best of a few."""
    source = torch.empty(2**30 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize()

    copy()
    return 2 * source.numel() / min(timed(copy) for _ in range(10))


def _measure(settings: EngineBenchmark, tiling: str, device: torch.device) -> dict[str, Any]:
    processor = full_size_processor(tiling, settings.quick)
    model = random_model(processor, settings.quick, settings.seed, device)
    budgets = EngineSettings(max_length=1024, max_waiting=settings.at_once, image_cache_bytes=0)
    with Engine(model, processor, budgets) as engine:
        # Other pictures each time, the tower's work included; the first ones warm up, and capture graphs.
        alone = [_ask(engine, prompt) for prompt in _prompts(processor, settings.alone + 2, settings.seed)][2:]
        many = _prompts(processor, settings.at_once, settings.seed + 1)
        engine.generate(many[:8])
        seconds = timed(lambda: engine.generate(many))
    # A token reads the language model and its head once; of the embeddings it reads a row.
    weights = [model.model.language_model.layers, model.model.language_model.final_layernorm, model.lm_head]
    sizes = (each.numel() * each.element_size() for part in weights for each in part.parameters())
    return {
        "first_token_ms": 1000 * median(first for first, _ in alone),
        "tokens_per_s": 1 / median(per_token for _, per_token in alone),
        "bytes_per_token": sum(sizes),
        "requests_per_s": settings.at_once / seconds,
    }


def _ask(engine: Engine, prompt: Prompt) -> tuple[float, float]:
    """Seconds to the first text, and per token after it."""
    start = time.perf_counter()
    first, tokens_then, tokens = None, 0, 0
    for chunk in engine.stream(prompt):
        tokens += len(chunk.token_ids)
        if first is None and chunk.text:
            first, tokens_then = time.perf_counter(), tokens
    assert first is not None
    return first - start, (time.perf_counter() - first) / (tokens - tokens_then)


def random_model(
    processor: FlashSlothProcessor, quick: bool, seed: int, device: torch.device
) -> FlashSlothForConditionalGeneration:
    """A model in bf16 that never ends an answer, and says nothing that the processor's small vocabulary lacks."""
    shape = FlashSlothConfig.tiny if quick else FlashSlothConfig.base
    config = shape(**processor_fields(processor))
    torch.manual_seed(seed)
    with torch.device(device):
        model = FlashSlothForConditionalGeneration(config).to(torch.bfloat16)
    with torch.no_grad():
        model.lm_head.bias[len(processor.tokenizer) :] = -1e9
        model.lm_head.bias[processor.tokenizer.all_special_ids] = -1e9
        model.lm_head.bias[[processor.eos_token_id, processor.image_token_id, processor.query_token_id]] = -1e9
    return model.eval()


def _prompts(processor: FlashSlothProcessor, count: int, seed: int) -> list[Prompt]:
    encoder, random = Encoder(processor), np.random.default_rng(seed)
    messages = [{"role": "user", "content": _QUESTION}]
    pictures = (Image.fromarray(random.integers(0, 256, (400, 500, 3), np.uint8)) for _ in range(count))
    return [encoder.prompt(messages, picture, Sampling(max_tokens=_TOKENS)) for picture in pictures]


def _table(found: dict[str, dict[str, Any]], bandwidth: float) -> Table:
    rows = [
        [
            name,
            f"{each['first_token_ms']:.1f}",
            f"{each['tokens_per_s']:.1f}",
            f"{each['bandwidth_share']:.0%}",
            f"{each['requests_per_s']:.1f}",
        ]
        for name, each in found.items()
    ]
    gigabytes = found["base"]["bytes_per_token"] / 1e9
    notes = [
        f"Random weights in bf16, {_TOKENS} tokens an answer, a new picture each; prompts ready made. Bandwidth: what "
        f"a large copy reaches here, {bandwidth / 1e9:,.0f} GB/s; a token reads {gigabytes:.2f} GB."
    ]
    columns = ["model", "first text alone, ms (p50)", "tokens/s alone", "of bandwidth", "requests/s at once"]
    return Table(title="The bare engine", columns=columns, rows=rows, notes=notes)


def _bounds(base: dict[str, Any]) -> list[Bound]:
    return [
        Bound(name="first text alone, ms", sense="at most", wanted=12, measured=base["first_token_ms"]),
        Bound(name="decoding alone, of bandwidth", sense="at least", wanted=0.6, measured=base["bandwidth_share"]),
        Bound(name="requests/s at 128 tokens", sense="at least", wanted=45, measured=base["requests_per_s"]),
    ]
