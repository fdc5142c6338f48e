"""The engine to beat: `@serve.batch` around `model.generate`, behind the same ingress.

Requests that arrive together are one batch, which ends with its longest answer; who comes later waits for its end.
"""

# No "from __future__ import annotations" here: Serve reads build_static_app's annotation.
import asyncio
from typing import Any

import torch
from prometheus_client import Metric
from ray import serve
from ray.serve import Application
from transformers.utils.logging import disable_progress_bar

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.collation import collate
from flashsloth.image_processing_flashsloth import normalize_pixels
from pipelines.serving.app import Ingress
from pipelines.serving.checkpoint import load_model, load_processor
from pipelines.serving.engine import Prompt
from pipelines.serving.replies import Reply
from pipelines.serving.settings import ServeArgs

WAIT_S = 0.01
"""How long the first request of a batch waits for others."""


class StaticEngine:
    """One model; greedy answers only."""

    def __init__(self, args: ServeArgs) -> None:
        disable_progress_bar()
        self._model = load_model(args.checkpoint, args.device, args.dtype)
        self._processor = load_processor(args.checkpoint)
        batching: Any = self.answer  # the decorator below adds the setters
        batching.set_max_batch_size(args.engine.max_slots)
        batching.set_batch_wait_timeout_s(WAIT_S)

    @serve.batch
    async def answer(self, prompts: list[Prompt]) -> list[Reply]:
        """Answer a batch."""
        answers = await asyncio.to_thread(generate, self._model, self._processor, prompts)
        return [
            Reply(self._processor.tokenizer.decode(ids, skip_special_tokens=True), len(ids), "length")
            for ids in answers
        ]

    async def collect(self) -> list[Metric]:
        """Nothing is counted here."""
        return []


@torch.inference_mode()
def generate(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, prompts: list[Prompt]
) -> list[list[int]]:
    """The tokens of each answer, by one call of `model.generate` for all: each cut at its own `max_tokens`."""
    samples = []
    for prompt in prompts:
        sample: dict[str, Any] = {"input_ids": prompt.input_ids, "question_ids": prompt.question_ids}
        if prompt.pixel_values is not None:
            sample["pixel_values"] = prompt.pixel_values
        samples.append(sample)
    batch: dict[str, Any] = collate(samples, processor.pad_token_id)
    if "pixel_values" in batch:
        batch["pixel_values"] = normalize_pixels(batch["pixel_values"])
    longest = max(prompt.sampling.max_tokens for prompt in prompts)
    found = model.generate(**batch, max_new_tokens=longest, do_sample=False, eos_token_id=processor.eos_token_id)
    answers = found[:, batch["input_ids"].shape[1] :].tolist()
    return [ids[: prompt.sampling.max_tokens] for ids, prompt in zip(answers, prompts, strict=True)]


def build_static_app(args: ServeArgs) -> Application:
    """The application with this engine in place of ours."""
    engine = serve.deployment(
        name="Static",
        ray_actor_options={"num_cpus": args.num_cpus},
        max_ongoing_requests=4 * args.engine.max_slots,
    )(StaticEngine).bind(args)
    return serve.deployment(
        name="StaticIngress",
        ray_actor_options={"num_cpus": args.ingress_num_cpus},
        max_ongoing_requests=1000,
        user_config={},
    )(serve.ingress()(Ingress)).bind(args, args.model_name, engine)
