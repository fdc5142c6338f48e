"""The two forward passes of the engine: prompts into slots, and one more token for every slot in use.

Decoding calls Phi's layers one by one with slots for a cache: the wrappers of a whole `forward` cost as much as the
layers do at the sizes that a CPU decodes, and a CUDA graph wants no Python that depends on the data.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.collation import collate
from pipelines.serving.cuda_graphs import GraphedStep
from pipelines.serving.images import ImageStore
from pipelines.serving.prompts import Prompt
from pipelines.serving.slots import Slots, SlotStep


class Decoder:
    """A model and its slots.

    Args:
        model: in evaluation mode.
        slots: of the model's device and dtype.
        images: encodes what prompts show.
        cuda_graphs: replay decode steps as CUDA graphs.
    """

    def __init__(
        self, model: FlashSlothForConditionalGeneration, slots: Slots, images: ImageStore, cuda_graphs: bool = False
    ) -> None:
        self.model = model
        self.slots = slots
        self.images = images
        config = model.config
        # A placeholder is no word: fed back, it would ask for an image or a query that nobody gave.
        self._forbidden = torch.zeros(config.text_config.vocab_size, device=model.device)
        self._forbidden[[config.image_token_id, config.query_token_id]] = -torch.inf
        self._graphs = GraphedStep(self._step, slots) if cuda_graphs else None

    def prefill(self, prompts: Sequence[Prompt], slot: int) -> torch.Tensor:
        """Read whole prompts into the slots from `slot` on.

        Returns:
            The logits of each prompt's next token, float32[len(prompts), vocabulary].

        Raises:
            ValueError: the query tokens of a prompt do not match its turns.
        """
        samples = [{"input_ids": prompt.input_ids, "question_ids": prompt.question_ids} for prompt in prompts]
        # Padding on the right needs no mask: nothing looks ahead, and what it leaves in a slot is never looked at.
        batch = collate(samples, self.model.config.pad_token_id or 0, padding_side="right")
        image = self.images.encode(prompts)
        cache = DynamicCache()
        outputs = self.model.model(
            input_ids=batch["input_ids"].to(self.model.device),
            question_ids=batch["question_ids"].to(self.model.device),
            mm_encoder_outputs=None if image is None else {"image": image},
            past_key_values=cache,
            use_cache=True,
        )
        self.slots.write(slot, cache)
        last = batch["attention_mask"].sum(1).to(self.model.device) - 1
        rows = torch.arange(len(prompts), device=self.model.device)
        return self._logits(outputs.last_hidden_state[rows, last])

    def decode(self, tokens: Sequence[int], positions: Sequence[int]) -> torch.Tensor:
        """Read one token into each of the first slots, at `positions`.

        Returns:
            The logits of the tokens after them, float32[len(tokens), vocabulary]; overwritten by the next call.
        """
        if self._graphs is not None:
            return self._graphs(tokens, positions)
        device = self.model.device
        return self._step(
            torch.tensor(tokens, device=device), torch.tensor(positions, device=device), max(positions) + 1
        )

    def _step(self, tokens: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
        phi = self.model.model.language_model
        rows = torch.arange(len(tokens), device=tokens.device)
        step = SlotStep(self.slots, rows, positions, length)
        mask = step.mask(self.slots.states.dtype)
        hidden = phi.embed_tokens(tokens)[:, None]
        rotation = phi.rotary_emb(hidden, positions[:, None])
        for layer in phi.layers:
            hidden = layer(hidden, attention_mask=mask, past_key_values=step, position_embeddings=rotation)
        return self._logits(phi.final_layernorm(hidden)[:, 0])

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.model.lm_head(hidden).float() + self._forbidden
