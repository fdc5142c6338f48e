"""A small byte-level BPE for the made-up corpus."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT = "<|endoftext|>"
# The model's query tokens are offset by the embedding of this one token (REFERENCE: token 764 of Phi-2).
QUERY_BIAS = " ."


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer of Phi-2's kind: byte-level BPE that adds no leading space and can spell any text.

    Give it the words of the conversation template too, so that they become whole tokens. " ." is always one token.

    Args:
        texts: what to learn from, each in the form in which it will be tokenized.
        vocab_size: how many entries at most; a small corpus may give fewer.

    Raises:
        ValueError: where `vocab_size` has no room for the 256 bytes, `<|endoftext|>` and " .".
    """
    texts = list(texts)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Merges are learned in order of frequency: once per text is often enough to come early.
    tokenizer.train_from_iterator([QUERY_BIAS * (1 + len(texts)), *texts], trainer)
    if len(tokenizer.encode(QUERY_BIAS).ids) != 1:
        raise ValueError(
            f"vocab_size {vocab_size} is too small: the 256 bytes and '{END_OF_TEXT}' leave {max(0, vocab_size - 257)} "
            f"entries, and '{QUERY_BIAS}' did not become one of them"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
    )
