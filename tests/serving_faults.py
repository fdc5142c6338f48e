"""An engine replica that goes wrong when a request asks it to."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from pipelines.serving.app import EngineReplica
from pipelines.serving.settings import ServeArgs

WEDGE = 777
"""`max_tokens` of a request whose prefill never ends, as a kernel that hangs on a GPU, where it begins before the time
(in seconds since 1970) that its `seed` says."""
OUT_OF_MEMORY = 778
"""`max_tokens` of a request that the memory does not suffice for."""


class FaultyReplica(EngineReplica):
    """Everything is as it is at work, but for two sizes of answers."""

    def __init__(self, args: ServeArgs) -> None:
        super().__init__(args)
        decoder = self._engine._batch.decoder
        prefill = decoder.prefill

        def faulty(prompts: Sequence[Any], slot: int) -> torch.Tensor:
            for prompt in prompts:
                if prompt.sampling.max_tokens == WEDGE and time.time() < prompt.sampling.seed:
                    threading.Event().wait()
                if prompt.sampling.max_tokens == OUT_OF_MEMORY:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return prefill(prompts, slot)

        decoder.prefill = faulty  # type: ignore[method-assign]
