"""Decode steps whose capture as a CUDA graph fails. No device here: what captures take of `torch.cuda` is played."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import PhiConfig

from flashsloth import FlashSlothProcessor
from pipelines.serving.batch import ContinuousBatch
from pipelines.serving.cuda_graphs import GraphedStep
from pipelines.serving.slots import Slots
from tests.batches import Sender, run
from tests.fixtures.tiny import build_processor
from tests.prompts import mixed_prompts

Step = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


class Stream:
    def wait_stream(self, other: Stream) -> None:
        pass


class Cuda:
    """Streams, and captures that fail at `fails_at`: "begin", "end" or nowhere."""

    def __init__(self) -> None:
        self.fails_at = ""
        self.error: Exception = RuntimeError("operation not permitted when stream is capturing")
        self.own_stream = self.current = Stream()
        self.num_captures = 0

    def set_stream(self, stream: Stream) -> None:
        self.current = stream

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    def graph(self, graph: Any, **_: Any) -> _Capture:
        return _Capture(self)


class _Capture:
    """As `torch.cuda.graph`, which does not leave its stream where it cannot begin, or end, a capture."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda

    def __enter__(self) -> None:
        self.before = self.cuda.current
        self.cuda.current = Stream()
        self.cuda.num_captures += 1
        self._fail("begin")

    def __exit__(self, *_: object) -> None:
        self._fail("end")
        self.cuda.current = self.before

    def _fail(self, place: str) -> None:
        if self.cuda.fails_at == place:
            raise self.cuda.error


class Graph:
    def replay(self) -> None:
        pass


@pytest.fixture(scope="module")
def processor() -> FlashSlothProcessor:
    return build_processor()


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda, tensor = Cuda(), torch.tensor
    for name, value in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": cuda.graph,
        "graph_pool_handle": lambda: None,
        "current_stream": lambda: cuda.current,
        "set_stream": cuda.set_stream,
        "stream": cuda.stream,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch, "tensor", lambda *args, pin_memory=False, **options: tensor(*args, **options))
    return cuda


def graphed(batch: ContinuousBatch, step: Step | None = None) -> ContinuousBatch:
    batch.decoder._graphs = GraphedStep(step or batch.decoder._step, batch.slots)
    return batch


@pytest.mark.parametrize("fails_at", ["begin", "end"])
@pytest.mark.parametrize("error", [RuntimeError("capture invalidated"), torch.OutOfMemoryError("no memory")])
def test_a_capture_that_fails_costs_no_request(
    processor: FlashSlothProcessor,
    build_batch: Callable[..., ContinuousBatch],
    cuda: Cuda,
    caplog: pytest.LogCaptureFixture,
    fails_at: str,
    error: Exception,
) -> None:
    prompts = mixed_prompts(processor)
    expected, batch = run(build_batch(), prompts), graphed(build_batch())
    cuda.fails_at, cuda.error = fails_at, error
    assert run(batch, prompts) == expected
    assert cuda.current is cuda.own_stream
    assert caplog.text.count("its capture failed") == cuda.num_captures < 8, "once for each size class"
    assert str(error) in caplog.text


def test_a_class_that_the_memory_does_not_suffice_for_is_decoded_without_its_spare_rows(
    processor: FlashSlothProcessor, build_batch: Callable[..., ContinuousBatch], cuda: Cuda
) -> None:
    """Three rows fit, the four that a graph for them has do not."""
    prompts = mixed_prompts(processor)[:3]
    expected, batch = run(build_batch(), prompts), build_batch(max_slots=4)
    step = batch.decoder._step
    cuda.fails_at = "end"  # of smaller classes, which no device replays here

    def failing(tokens: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
        if len(tokens) == 4:
            raise torch.OutOfMemoryError("four are too many")
        return step(tokens, positions, length)

    assert run(graphed(batch, failing), prompts) == expected
    assert cuda.current is cuda.own_stream


def test_out_of_memory_without_a_graph_ends_the_newest_request_alone(
    processor: FlashSlothProcessor, build_batch: Callable[..., ContinuousBatch], cuda: Cuda
) -> None:
    prompts = mixed_prompts(processor)[:3]
    expected, batch = run(build_batch(), prompts), build_batch(max_slots=4)
    step = batch.decoder._step
    cuda.fails_at = "end"

    def failing(tokens: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("three are too many")
        return step(tokens, positions, length)

    graphed(batch, failing)
    senders = [Sender(batch.submit(prompt)) for prompt in prompts]
    while batch.busy:
        batch.step()
    assert [sender.answer for sender in senders[:2]] == expected[:2]
    assert senders[2].chunks[-1].error == "OutOfMemoryError: three are too many"


def test_a_class_that_failed_is_not_captured_again_and_others_are(cuda: Cuda, caplog: pytest.LogCaptureFixture) -> None:
    config = PhiConfig(hidden_size=8, num_attention_heads=1, num_hidden_layers=1, max_position_embeddings=1024)
    slots = Slots(config, 8, 1024, torch.float32, torch.device("cpu"))
    sizes: list[tuple[int, int]] = []

    def step(tokens: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
        sizes.append((len(tokens), length))
        return tokens[:, None] + positions[:, None].float()

    graphs = GraphedStep(step, slots)
    cuda.fails_at = "end"
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert graphs([1, 2, 3], [300, 7, 9]).tolist() == [[301], [9], [12]]
    assert sizes == [(4, 512)] * 3 + [(3, 301)] * 3  # two to warm up, a capture
    assert len(caplog.records) == 1 and "4 rows of 512 positions" in caplog.text
    cuda.fails_at = ""
    for _ in range(3):
        assert graphs([1, 2], [10, 7]).tolist() == [[11], [9]]
    assert sizes[6:] == [(2, 256)] * 3
    assert (cuda.num_captures, len(caplog.records)) == (2, 1)
