"""Decode steps as CUDA graphs: at a few rows, launching the kernels of 32 layers takes longer than running them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from pipelines.serving.slots import Slots

logger = logging.getLogger(__name__)

SHORTEST = 256  # positions that the smallest graph reads

Step = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Tokens int64[n], positions int64[n] and the length that attention reads, to logits float32[n, vocabulary]."""


class GraphedStep:
    """A decode step that is captured once per size class, at its first use, and replayed from then on.

    A class is a number of rows and a length, both powers of two, so there are few. Rows that nobody has asked for read
    and write position 0 of slots that are free. Where a capture fails, the steps of its class run eagerly.
    """

    def __init__(self, step: Step, slots: Slots) -> None:
        self._step = step
        self._slots = slots
        self._graphs: dict[tuple[int, int], _Captured | None] = {}  # None: its capture has failed
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """One step; the logits are overwritten by the next one."""
        device, length = self._slots.states.device, max(positions) + 1
        size = size_class(len(tokens), length, self._slots)
        spare = [0] * (size[0] - len(tokens))
        new = torch.tensor([[*tokens, *spare], [*positions, *spare]], pin_memory=True)
        if size not in self._graphs:
            self._graphs[size] = self._try_capture(new.to(device), size)
        graph = self._graphs[size]
        if graph is None:
            inputs = new[:, : len(tokens)].to(device)
            return self._step(inputs[0], inputs[1], length)
        graph.inputs.copy_(new, non_blocking=True)
        graph.graph.replay()
        return graph.logits[: len(tokens)]

    def _try_capture(self, inputs: torch.Tensor, size: tuple[int, int]) -> _Captured | None:
        """The graph of a class, or None. Not tried twice: it would cost every step of the class as much as this one."""
        stream = torch.cuda.current_stream()
        try:
            return self._capture(inputs, size[1])
        except Exception:
            torch.cuda.set_stream(stream)  # `torch.cuda.graph` stays on its own where it cannot begin or end
            logger.warning("no CUDA graph for %d rows of %d positions: its capture failed", *size, exc_info=True)
            return None

    def _capture(self, inputs: torch.Tensor, length: int) -> _Captured:
        self._warm_up(inputs, length)
        graph = torch.cuda.CUDAGraph()
        # A health check may run in another thread meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._step(inputs[0], inputs[1], length)
        return _Captured(graph, inputs, logits)

    def _warm_up(self, inputs: torch.Tensor, length: int) -> None:
        # Libraries set themselves up at their first call, which must not be captured. With the true tokens: running a
        # step twice writes the same keys and values twice.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(stream):
                for _ in range(2):
                    self._step(inputs[0], inputs[1], length)
        finally:
            torch.cuda.current_stream().wait_stream(stream)  # what a failed one has begun still writes to the slots


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: torch.Tensor
    """int64[2, rows]: tokens and positions."""
    logits: torch.Tensor


def size_class(rows: int, length: int, slots: Slots) -> tuple[int, int]:
    """The smallest class that holds a step: powers of two, or all that there is."""
    return min(_power(rows), slots.num_slots), min(max(_power(length), SHORTEST), slots.length)


def _power(number: int) -> int:
    return 1 << (number - 1).bit_length()
