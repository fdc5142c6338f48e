"""FlashSlothProcessor: images + messages -> input_ids, labels, question_ids, pixel_values.

One template for training and inference: both go through `FlashSlothProcessor.encode`.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from .collation import IGNORED_LABEL, collate
from .conversation import (
    SYSTEM,
    TEMPLATE_VERSION,
    ConversationError,
    Message,
    Piece,
    caption_pieces,
    chat_pieces,
    read_conversation,
)
from .image_processing_flashsloth import FlashSlothImageProcessor

QUERY_TOKEN = "<learnable>"
EOS_TOKEN = "</s>"
IMAGE_TOKEN = "<image>"
PAD_TOKEN = "<|endoftext|>"
QUERY_BIAS_TEXT = " ."  # its embedding is added to the query tokens; token 764 of Phi-2


class FlashSlothProcessor(ProcessorMixin):
    """Puts an image processor and a tokenizer under FlashSloth's template.

    The tokenizer gets the structural tokens it lacks, in this order: `<learnable>`, `</s>`, `<image>` (with Phi-2's
    50295, 50296, 50297), and `<|endoftext|>` as padding. A tokenizer that has them is left as it is.

    Args:
        image_processor: cuts the tiles.
        tokenizer: a byte-level BPE like Phi-2's; changed in place as said above.
        num_image_tokens: sequence positions of one image, all tiles together: 81, HD 405.
        num_query_tokens: query positions of one turn.
        query_separator: text between a question and its query tokens. A space is the layout of the training data,
            ours in training and inference; the released checkpoints were evaluated with "".
        max_length: tokens above which `encode` refuses a conversation.
        system: text before the first turn.

    Raises:
        ValueError: if the tokenizer would read structure out of plain text or has no `<|endoftext|>`, or if the image
            tokens do not divide among the tiles.
    """

    def __init__(
        self,
        image_processor: FlashSlothImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        num_image_tokens: int = 81,
        num_query_tokens: int = 9,
        query_separator: str = " ",
        max_length: int = 3072,
        system: str = SYSTEM,
    ):
        super().__init__(image_processor, tokenizer)
        if num_image_tokens % image_processor.num_tiles:
            raise ValueError(
                f"{num_image_tokens} image tokens do not divide among the {image_processor.num_tiles} tiles of "
                f"tiling {image_processor.tiling!r}"
            )
        self.num_image_tokens = num_image_tokens
        self.num_query_tokens = num_query_tokens
        self.query_separator = query_separator
        self.max_length = max_length
        self.system = system
        _fit_tokenizer(tokenizer)
        vocabulary = tokenizer.get_vocab()
        self.query_token_id = vocabulary[QUERY_TOKEN]
        self.eos_token_id = vocabulary[EOS_TOKEN]
        self.image_token_id = vocabulary[IMAGE_TOKEN]
        self.pad_token_id = vocabulary[tokenizer.pad_token]
        for marker in (QUERY_TOKEN, EOS_TOKEN, IMAGE_TOKEN, tokenizer.pad_token):
            if vocabulary[marker] in self._text_ids([marker])[0]:
                raise ValueError(f"this tokenizer reads the text {marker!r} as structure; use a fast byte-level BPE")
        self._longest_token = _longest_token(tokenizer)

    @property
    def query_bias_token_id(self) -> int:
        """Id of " .", whose embedding the model adds to its query tokens: 764 for Phi-2.

        Raises:
            ValueError: if the tokenizer spells " ." with more than one token; a tokenizer must be trained on text
                where " ." occurs often enough to be merged.
        """
        ids = self._text_ids([QUERY_BIAS_TEXT])[0]
        if len(ids) != 1:
            raise ValueError(f"{QUERY_BIAS_TEXT!r} takes {len(ids)} tokens {ids} in this tokenizer; it must be one")
        return ids[0]

    @property
    def model_input_names(self) -> list[str]:
        """What `__call__` returns for a conversation with an image."""
        return ["input_ids", "attention_mask", "question_ids", "pixel_values"]

    def encode(
        self, messages: Sequence[Message], has_image: bool, layout: str = "chat", max_length: int | None = None
    ) -> dict[str, list[int]]:
        """One conversation -> ids, with every placeholder expanded.

        Args:
            messages: `{"role": "user" | "assistant", "content": str}` in turns, without image markers. Ending with an
                answer it is a training sample, ending with a question a prompt (up to " ASSISTANT:").
            has_image: whether an image goes before the first question.
            layout: "chat" or "caption" (alignment: image, caption; the question is thrown away).
            max_length: instead of the processor's.

        Returns:
            `input_ids, labels, question_ids`, lists of one length. Labels are -100 but for a sample's answers and
            their `</s>` (caption layout: the caption and the newline). A question id is k for tokens of question k
            and for its query tokens, else 0.

        Raises:
            ConversationError: for a conversation that cannot be laid out, and too_long.
            ValueError: for an unknown layout.
        """
        limit = self.max_length if max_length is None else max_length
        if layout == "chat":
            _check_fewest((len(messages) + 1) // 2 * self.num_query_tokens, limit)  # before a piece is cut
            pieces = chat_pieces(messages, has_image, self.system, self.query_separator)
        elif layout == "caption":
            pieces = caption_pieces(messages, has_image)
        else:
            raise ValueError(f"layout is {layout!r}; it must be 'chat' or 'caption'")
        _check_fewest(self._fewest_tokens(pieces), limit)
        sample = self._sample(pieces)
        if len(sample["input_ids"]) > limit:
            raise ConversationError("too_long", f"{len(sample['input_ids'])} tokens; at most {limit}")
        return sample

    def __call__(  # type: ignore[override]
        self,
        images: Image.Image | Sequence[Image.Image | None] | None = None,
        messages: Sequence[Message] | Sequence[Sequence[Message]] = (),
        padding_side: str = "left",
        max_length: int | None = None,
    ) -> BatchFeature:
        """Prompts for `generate`: one conversation or several, padded, as torch tensors.

        Args:
            images: a picture (or None) for each conversation; one picture may stand alone beside one conversation.
            messages: a conversation, or a list of conversations, as in `encode`.
            padding_side: "left" for generation.
            max_length: instead of the processor's.

        Returns:
            `input_ids, attention_mask, question_ids: int64[B, S]` and, with any image,
            `pixel_values: float32[N, T, 3, H, W]` in order of appearance.

        Raises:
            ConversationError: as `encode`.
            ValueError: if the numbers of images and conversations differ.
        """
        single = not messages or not isinstance(messages[0], Sequence)
        conversations: Any = [messages] if single else messages
        pictures = [images] * len(conversations) if images is None else images
        pictures = [pictures] if isinstance(pictures, Image.Image) else pictures
        if len(pictures) != len(conversations):
            raise ValueError(
                f"{len(pictures)} images for {len(conversations)} conversations; pass one each, or None for none"
            )
        samples: list[dict[str, Any]] = []
        for conversation, picture in zip(conversations, pictures, strict=True):
            sample = self.encode(conversation, picture is not None, max_length=max_length)
            samples.append({key: sample[key] for key in ("input_ids", "question_ids")})
        batch = collate(samples, self.pad_token_id, padding_side)
        present = [picture for picture in pictures if picture is not None]
        if present:
            batch["pixel_values"] = self.image_processor(present)["pixel_values"]
        return BatchFeature(batch)

    def apply_chat_template(  # type: ignore[override]
        self,
        conversation: Sequence[Message] | Sequence[Sequence[Message]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tokenize: bool = True,
        return_dict: bool = True,
        return_tensors: str = "pt",
        processor_kwargs: Mapping[str, Any] | None = None,
    ) -> BatchFeature:
        """Conversations with typed content (Hugging Face's or OpenAI's parts) -> what `generate` takes.

        There is no string form on purpose: in a string, a user's "<image>" and ours would be the same thing.

        Args:
            conversation: one or several; see `flashsloth.conversation.read_conversation` for the parts.
            add_generation_prompt: must be True for a conversation that ends with a question (the prompt is part of
                that turn) and False for one that ends with an answer.
            continue_final_message: must be False.
            tokenize: must be True.
            return_dict: must be True.
            return_tensors: must be "pt".
            processor_kwargs: `padding_side` and `max_length` for `__call__`.

        Raises:
            ConversationError: as `read_conversation` and `encode`.
            ImageError: for an image that cannot be decoded.
            ValueError: for an option that does not hold what is said above.
        """
        if not tokenize or not return_dict or return_tensors != "pt" or continue_final_message:
            raise ValueError(
                "only tokenize=True, return_dict=True, return_tensors='pt', continue_final_message=False are supported"
            )
        single = not conversation or not isinstance(conversation[0], Sequence)
        conversations: Any = [conversation] if single else conversation
        read = [read_conversation(turns) for turns in conversations]
        for messages, _ in read:
            if messages and (messages[-1]["role"] == "user") != add_generation_prompt:
                raise ValueError(
                    f"add_generation_prompt={add_generation_prompt} with a conversation that ends with the "
                    f"{messages[-1]['role']}"
                )
        images = [image for _, image in read]
        return self(images=images, messages=[messages for messages, _ in read], **(processor_kwargs or {}))

    def post_process(self, generated_ids: Tensor | Sequence[Sequence[int]]) -> list[str]:
        """Generated ids `int[B, S]`, prompt cut off -> answers: no special tokens, nothing around the text."""
        texts = self.tokenizer.batch_decode(generated_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.strip() for text in texts]

    def identity(self) -> str:
        """sha256 over everything that changes ids or pixels; the same after saving and loading.

        `max_length` is left out: it decides which conversations are refused, not what they become.
        """
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        parts = {
            "tokenizer": {key: tokenizer[key] for key in ("normalizer", "pre_tokenizer", "model", "added_tokens")},
            "marks": [self.query_token_id, self.eos_token_id, self.image_token_id, self.pad_token_id],
            "template": [TEMPLATE_VERSION, self.system, self.query_separator],
            "counts": [self.num_image_tokens, self.num_query_tokens],
            "image": [self.image_processor.tiling, self.image_processor.size],
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def _fewest_tokens(self, pieces: Sequence[Piece]) -> int:
        """As many tokens as `pieces` have at least: tokenizing megabytes takes seconds, counting bytes does not."""
        sizes = {"image": self.num_image_tokens, "query": self.num_query_tokens, "eos": 1, "text": 0}
        num_bytes = sum(len(piece.text.encode(errors="replace")) for piece in pieces)
        return sum(sizes[piece.kind] for piece in pieces) + math.ceil(num_bytes / self._longest_token)

    def _sample(self, pieces: Sequence[Piece]) -> dict[str, list[int]]:
        texts = iter(self._text_ids([piece.text for piece in pieces if piece.kind == "text"]))
        marks = {
            "image": [self.image_token_id] * self.num_image_tokens,
            "query": [self.query_token_id] * self.num_query_tokens,
            "eos": [self.eos_token_id],
        }
        input_ids: list[int] = []
        labels: list[int] = []
        question_ids: list[int] = []
        for piece in pieces:
            ids = next(texts) if piece.kind == "text" else marks[piece.kind]
            input_ids += ids
            labels += ids if piece.learned else [IGNORED_LABEL] * len(ids)
            question_ids += [piece.turn] * len(ids)
        return {"input_ids": input_ids, "labels": labels, "question_ids": question_ids}

    def _text_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of texts as plain text: `split_special_tokens` keeps a spelled-out "</s>" from becoming the token."""
        encoding = self.tokenizer(
            list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False
        )
        return encoding["input_ids"]


def _check_fewest(fewest: int, limit: int) -> None:
    if fewest > limit:
        raise ConversationError("too_long", f"at least {fewest} tokens; at most {limit}")


def _longest_token(tokenizer: PreTrainedTokenizerBase) -> float:
    """Most bytes of text that one token stands for; infinite where the tokenizer may leave text away.

    A token of byte-level BPE is spelled with a character for each of its bytes; one that was added, as it is.
    """
    backend = tokenizer.backend_tokenizer
    added = tokenizer.added_tokens_decoder.values()
    keeps_text = backend.normalizer is None and isinstance(backend.pre_tokenizer, ByteLevel)
    knows_bytes = set(ByteLevel.alphabet()) <= tokenizer.get_vocab().keys()
    takes_spaces = any(token.lstrip or token.rstrip for token in added)
    if not keeps_text or not knows_bytes or takes_spaces:
        return math.inf
    spelled = max(len(token) for token in tokenizer.get_vocab())
    return max(spelled, *(len(token.content.encode()) for token in added))


def _fit_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in (QUERY_TOKEN, EOS_TOKEN, IMAGE_TOKEN) if token not in vocabulary]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    if tokenizer.pad_token is None:
        if PAD_TOKEN not in vocabulary:
            raise ValueError(f"the tokenizer has neither a padding token nor {PAD_TOKEN!r}; set tokenizer.pad_token")
        tokenizer.pad_token = PAD_TOKEN
