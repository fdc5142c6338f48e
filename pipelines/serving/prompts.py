"""What the engine is asked: conversations become prompts."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from flashsloth import FlashSlothConfig, FlashSlothProcessor
from flashsloth.conversation import ConversationError
from pipelines.serving.sampling import Sampling


@dataclass(frozen=True)
class Prompt:
    """One request as the engine takes it.

    Attributes:
        input_ids: placeholders expanded, ending in " ASSISTANT:".
        question_ids: as long as `input_ids`; k at the question and query tokens of turn k, else 0.
        pixel_values: uint8[T, 3, H, W], or None without an image.
        sampling: how the answer is drawn and where it ends.
        image_key: names the content of `pixel_values`, their sha256 where not given. Images of one key are encoded
            once: whoever gives a key vouches that it is the content's.
    """

    input_ids: list[int]
    question_ids: list[int]
    pixel_values: np.ndarray | None = None
    sampling: Sampling = field(default_factory=Sampling)
    image_key: str | None = None

    def __post_init__(self) -> None:
        if self.image_key is None and self.pixel_values is not None:
            content = hashlib.sha256(str(self.pixel_values.shape).encode())
            content.update(np.ascontiguousarray(self.pixel_values).data)
            object.__setattr__(self, "image_key", content.hexdigest())


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
            TypeError: `messages` is no list, or `image` no PIL image.
        """
        if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
            raise TypeError('messages is a list of turns, such as [{"role": "user", "content": "What is it?"}]')
        if image is not None and not isinstance(image, Image.Image):
            raise TypeError(f"image is a {type(image).__name__}; give a PIL image, such as Image.open(path)")
        if messages and messages[-1].get("role") == "assistant":
            raise ConversationError("role_order", "the last message is the assistant's, not a question")
        with self._tokenizing:
            sample = self.processor.encode(messages, has_image=image is not None, max_length=max_length)
        pixels = None if image is None else self.processor.image_processor.to_uint8(image)
        return Prompt(sample["input_ids"], sample["question_ids"], pixels, sampling or Sampling())


def check_prompt(prompt: Prompt, config: FlashSlothConfig, max_length: int) -> None:
    """Check one prompt by itself. The model checks a batch: there, one's missing image could be another's spare one.

    Raises:
        TypeError: it is no prompt.
        ValueError: it is empty, its parts do not match in number, a token is none of the vocabulary, or with its answer
            it is longer than `max_length`; of an answer that shrinks, with its first token.
    """
    if not isinstance(prompt, Prompt):
        raise TypeError(f"a request is a Prompt, not a {type(prompt).__name__}: Encoder(processor).prompt makes one")
    length, longest = len(prompt.input_ids), prompt.sampling.max_tokens
    if not length or length != len(prompt.question_ids):
        raise ValueError(
            f"{length} input_ids and {len(prompt.question_ids)} question_ids: give one each per token, at least one"
        )
    vocabulary = config.text_config.vocab_size
    strange = [token for token in (min(prompt.input_ids), max(prompt.input_ids)) if not 0 <= token < vocabulary]
    if strange:
        raise ValueError(f"{strange[0]} stands in input_ids; the model's vocabulary has {vocabulary} tokens, from 0 on")
    if prompt.sampling.shrinks and length >= max_length:
        raise ValueError(
            f"{length} prompt tokens leave no room for an answer in a slot, which holds {max_length}: shorten the "
            "prompt, or raise the engine's max_length"
        )
    if not prompt.sampling.shrinks and length + longest > max_length:
        raise ValueError(
            f"{length} prompt tokens and up to {longest} answer tokens are {length + longest}, a slot holds "
            f"{max_length}: shorten the prompt, lower max_tokens, or raise the engine's max_length"
        )
    pixels, size = prompt.pixel_values, config.vision_config.image_size
    expected = (config.num_tiles, 3, size, size)
    if pixels is not None and (pixels.shape != expected or pixels.dtype != np.uint8):
        raise ValueError(f"pixel_values are {pixels.dtype}{list(pixels.shape)}, this model takes uint8{list(expected)}")
    placeholders = prompt.input_ids.count(config.image_token_id)
    features = 0 if pixels is None else config.num_image_tokens
    if placeholders != features:
        raise ValueError(f"{placeholders} image placeholders stand in input_ids, the image gives {features}")
    queries = prompt.input_ids.count(config.query_token_id)
    if queries % config.num_query_tokens:
        raise ValueError(f"{queries} query tokens are no whole number of turns of {config.num_query_tokens}")
