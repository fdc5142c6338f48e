"""The engine: prompts in, answers out, several at a time. Plain Python and torch, usable without Ray.

    engine = Engine.from_checkpoint("outputs/instruct/export")
    (answer,) = engine.generate([Encoder(engine.processor).prompt(messages, image)])

A call is one left-padded prefill (tower, pooling and EmbQ once per image) and then one decode step per token. Each row
has its own sampling, its own stops and its own end, and leaves the batch as soon as it has it. What a row gets does
not depend on its neighbours: greedy rows equal one-by-one `model.generate`, sampled rows draw from their own seed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from transformers import DynamicCache

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.collation import collate
from flashsloth.conversation import ConversationError
from flashsloth.image_processing_flashsloth import normalize_pixels
from pipelines.serving.checkpoint import load_model, load_processor
from pipelines.serving.sampling import Sampling, TokenChooser


@dataclass(frozen=True)
class Prompt:
    """One request as the engine takes it.

    Attributes:
        input_ids: placeholders expanded, ending in " ASSISTANT:".
        question_ids: as long as `input_ids`; k at the question and query tokens of turn k, else 0.
        pixel_values: uint8[T, 3, H, W], or None without an image.
        sampling: how the answer is drawn and where it ends.
    """

    input_ids: list[int]
    question_ids: list[int]
    pixel_values: np.ndarray | None = None
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True)
class Answer:
    """What came out for one prompt.

    Attributes:
        token_ids: the generated tokens, without the end of sequence.
        text: the answer, without special tokens, cut before a stop string.
        finish_reason: "stop" at an end of sequence or a stop string, "length" at `max_tokens`.
    """

    token_ids: list[int]
    text: str
    finish_reason: Literal["stop", "length"]


class Encoder:
    """Conversations to prompts, from any number of threads."""

    def __init__(self, processor: FlashSlothProcessor) -> None:
        self.processor = processor
        self._tokenizing = threading.Lock()  # a tokenizer changes its own state while it works

    def prompt(
        self,
        messages: Sequence[Mapping[str, str]],
        image: Image.Image | None = None,
        sampling: Sampling | None = None,
        max_length: int | None = None,
    ) -> Prompt:
        """Encode a conversation that ends with a question.

        Raises:
            ConversationError: it ends otherwise, cannot be laid out, or is longer than `max_length` tokens.
        """
        if messages and messages[-1]["role"] != "user":
            raise ConversationError("role_order", f"the last message is the {messages[-1]['role']}'s, not a question")
        with self._tokenizing:
            sample = self.processor.encode(messages, has_image=image is not None, max_length=max_length)
        pixels = None if image is None else self.processor.image_processor.to_uint8(image)
        return Prompt(sample["input_ids"], sample["question_ids"], pixels, sampling or Sampling())


class Engine:
    """A model that answers batches of prompts. `generate` may be called from one thread at a time."""

    def __init__(self, model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor) -> None:
        self.model = model.eval()
        self.processor = processor
        self.device = model.device
        # A placeholder is no word: fed back, it would ask for an image or a query that nobody gave.
        self._never = [processor.image_token_id, processor.query_token_id]
        self._last_step = time.monotonic()
        self._running = False

    @classmethod
    def from_checkpoint(cls, checkpoint: str | Path, device: str = "auto", dtype: str = "auto") -> Engine:
        """Load an exported checkpoint; raises `CheckpointError` where the folder holds none that can be served."""
        model = load_model(checkpoint, device, dtype)
        return cls(model, load_processor(checkpoint))

    @torch.inference_mode()
    def generate(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Answer all prompts together, in their order.

        Raises:
            ValueError: the model refuses a prompt whose placeholders do not match its image.
        """
        if not prompts:
            return []
        self._running = True
        try:
            return _Run(self, prompts).finish()
        finally:
            self._running = False

    @torch.inference_mode()
    def check(self, patience_s: float = 60.0) -> None:
        """Raise `RuntimeError` where the model gives no answers any more.

        While a batch runs, its last step must not lie longer back than `patience_s`. Otherwise one token is run.
        """
        if self._running:
            idle = time.monotonic() - self._last_step
            if idle > patience_s:
                raise RuntimeError(f"no decode step in {idle:.0f} s, at most {patience_s:.0f} are allowed")
            return
        token = torch.tensor([[self.processor.eos_token_id]], device=self.device)
        if not bool(self.model(input_ids=token).logits.isfinite().all()):
            raise RuntimeError("the model gives logits that are not finite")

    def step(self, **inputs: Any) -> tuple[torch.Tensor, DynamicCache]:
        """One forward pass: the last position's logits, float32[B, vocabulary], and the cache."""
        outputs = self.model(**inputs, use_cache=True, logits_to_keep=1)
        logits = outputs.logits[:, -1].float()
        logits[:, self._never] = -torch.inf
        self._last_step = time.monotonic()
        return logits, outputs.past_key_values


class _Row:
    """The state of one prompt on its way through a run."""

    def __init__(self, prompt: Prompt, processor: FlashSlothProcessor) -> None:
        self.sampling = prompt.sampling
        self.processor = processor
        self.chooser = TokenChooser(prompt.sampling)
        self.token_ids: list[int] = []
        self.text = ""
        self.finish_reason: Literal["stop", "length"] | None = None

    def take(self, token_id: int) -> None:
        """Append a token, or end the row with it."""
        if token_id == self.processor.eos_token_id:
            self.finish_reason = "stop"
            return
        self.token_ids.append(token_id)
        if self._reaches_stop():
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.sampling.max_tokens:
            self.finish_reason = "length"

    def answer(self) -> Answer:
        assert self.finish_reason is not None
        text = self._decode()
        ends = [text.index(stop) for stop in self.sampling.stop if stop in text]
        return Answer(self.token_ids, text[: min(ends, default=len(text))].strip(), self.finish_reason)

    def _reaches_stop(self) -> bool:
        return bool(self.sampling.stop) and any(stop in self._decode() for stop in self.sampling.stop)

    def _decode(self) -> str:
        tokenizer = self.processor.tokenizer
        return tokenizer.decode(self.token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class _Run:
    """One prefill and its decode steps, over the rows that are not finished yet."""

    def __init__(self, engine: Engine, prompts: Sequence[Prompt]) -> None:
        self.engine = engine
        self.prompts = prompts
        self.rows = [_Row(prompt, engine.processor) for prompt in prompts]

    def finish(self) -> list[Answer]:
        live = self.rows
        logits, cache, mask = self._prefill()
        while True:
            next_ids = [row.chooser.choose(logits[i]) for i, row in enumerate(live)]
            for row, token_id in zip(live, next_ids, strict=True):
                row.take(token_id)
            keep = [i for i, row in enumerate(live) if row.finish_reason is None]
            if not keep:
                return [row.answer() for row in self.rows]
            if len(keep) < len(live):
                live, mask = [live[i] for i in keep], mask[keep]
                cache.batch_select_indices(torch.tensor(keep, device=self.engine.device))
            mask = torch.cat([mask, mask.new_ones(len(live), 1)], dim=1)
            logits, cache = self.engine.step(
                input_ids=torch.tensor([[next_ids[i]] for i in keep], device=self.engine.device),
                attention_mask=mask,
                position_ids=mask.sum(1, keepdim=True) - 1,
                past_key_values=cache,
            )

    def _prefill(self) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
        """The first step, over whole prompts; also the attention mask int64[B, S]."""
        samples = [
            {"input_ids": p.input_ids, "question_ids": p.question_ids, "pixel_values": p.pixel_values}
            for p in self.prompts
        ]
        batch = collate(samples, self.engine.processor.pad_token_id, padding_side="left")
        batch = {name: tensor.to(self.engine.device) for name, tensor in batch.items()}
        if "pixel_values" in batch:
            batch["pixel_values"] = normalize_pixels(batch["pixel_values"]).to(self.engine.model.dtype)
        mask = batch["attention_mask"]
        # As `generate` numbers positions: padding takes none of them.
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        logits, cache = self.engine.step(**batch, position_ids=positions, past_key_values=DynamicCache())
        return logits, cache, mask
