"""Prompts for the engine's tests, and the slow twin that says what it must answer."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from flashsloth import FlashSlothForConditionalGeneration, FlashSlothProcessor
from flashsloth.collation import collate
from flashsloth.image_processing_flashsloth import normalize_pixels
from pipelines.serving.prompts import Encoder, Prompt
from pipelines.serving.sampling import Sampling

WORDS = ["what", "where", "is", "the", "red", "blue", "square", "circle", "left", "of", "grey", "triangle", "?", "many"]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (60, 80, 3), dtype=np.uint8))


def conversation(*questions: str) -> list[dict[str, str]]:
    messages = []
    for question in questions:
        messages += [{"role": "user", "content": question}, {"role": "assistant", "content": "Yes, a red one ."}]
    return messages[:-1]


def mixed_prompts(processor: FlashSlothProcessor, max_tokens: int = 12) -> list[Prompt]:
    """Different lengths, with and without an image, one turn and several."""
    encoder = Encoder(processor)
    asked = [
        (conversation("What color is the square?"), picture(0)),
        (conversation("Is there a blue triangle? Look at the left and at the right before you say so."), None),
        (conversation("Hi"), picture(1)),
        (conversation("How many circles?", "And where?", "Which color?"), picture(2)),
        (conversation("One?", "Two?"), None),
        (conversation("A red square above a green circle?"), picture(0)),
        (conversation("?"), None),
        (conversation("Is it on a grey background?", "Are you sure about the background?"), picture(3)),
    ]
    return [encoder.prompt(messages, image, Sampling(max_tokens=max_tokens)) for messages, image in asked]


def random_prompt(encoder: Encoder, source: random.Random) -> Prompt:
    """One to three turns, of one of four pictures or of none, to be answered in at most 14 tokens."""
    turns = [" ".join(source.choices(WORDS, k=source.randint(1, 12))) for _ in range(source.randint(1, 3))]
    image = picture(source.randrange(4)) if source.random() < 0.6 else None
    return encoder.prompt(conversation(*turns), image, Sampling(max_tokens=source.randint(1, 14)))


def sampled(prompt: Prompt, **changes: Any) -> Prompt:
    """The same question, with another `Sampling`."""
    return replace(prompt, sampling=replace(prompt.sampling, **changes))


def generate_alone(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, prompt: Prompt
) -> list[int]:
    """The slow twin: one prompt through `model.generate`, without padding."""
    sample = {"input_ids": prompt.input_ids, "question_ids": prompt.question_ids, "pixel_values": prompt.pixel_values}
    batch: dict[str, Any] = collate([sample], processor.pad_token_id)
    if "pixel_values" in batch:
        batch["pixel_values"] = normalize_pixels(batch["pixel_values"])
    tokens = model.generate(
        **batch,
        max_new_tokens=prompt.sampling.max_tokens,
        do_sample=False,
        eos_token_id=processor.eos_token_id,
        suppress_tokens=[processor.image_token_id, processor.query_token_id],
    )[0, len(prompt.input_ids) :].tolist()
    return tokens[:-1] if tokens[-1] == processor.eos_token_id else tokens
