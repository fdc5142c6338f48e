"""The two forward passes of the engine: prompts into slots, and one more token for every slot in use."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.collation import collate
from flashsloth.placeholders import plan_queries
from pipelines.serving.cuda_graphs import GraphedStep
from pipelines.serving.fused_phi import FusedPhi
from pipelines.serving.images import ImageStore
from pipelines.serving.prompts import Prompt
from pipelines.serving.shared_prefix import SharedPrefix
from pipelines.serving.slot_attention import DecodeStep, Prefill
from pipelines.serving.slots import Slots


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
        self._phi = FusedPhi(model.model.language_model)
        config = model.config
        # A placeholder is no word: fed back, it would ask for an image or a query that nobody gave.
        placeholders = [config.image_token_id, config.query_token_id]
        self._forbidden = torch.zeros(config.text_config.vocab_size, device=model.device)
        self._forbidden[placeholders] = -torch.inf
        self._prefix = SharedPrefix(slots, placeholders)
        self._graphs = GraphedStep(self._step, slots) if cuda_graphs else None

    def prefill(self, prompts: Sequence[Prompt], slot: int) -> torch.Tensor:
        """Read whole prompts into the slots from `slot` on; what they begin with is copied where it is known.

        Returns:
            The logits of each prompt's next token, float32[len(prompts), vocabulary].

        Raises:
            ValueError: the query tokens of a prompt do not match its turns.
        """
        start = self._prefix.place(prompts, slot)
        samples = [{"input_ids": p.input_ids[start:], "question_ids": p.question_ids[start:]} for p in prompts]
        batch = collate(samples, self.model.config.pad_token_id or 0, padding_side="right")
        input_ids, device = batch["input_ids"], self.model.device
        # Tokens stay on the CPU: what is checked and planned there need not wait for the images on a GPU.
        image, plan = self.images.encode(prompts), None
        if image is not None:
            plan = plan_queries(input_ids, batch["question_ids"], self.model.config).to(device)
        hidden = self._phi(
            self.model.model.embed(input_ids, image, device=device),
            torch.arange(start, start + input_ids.shape[1], device=device)[None],
            Prefill(self.slots, slot, start),
            plan,
            None if image is None else image.last_hidden_state,
        )
        self._prefix.keep(prompts, slot)
        last = torch.tensor([len(sample["input_ids"]) - 1 for sample in samples], device=device)
        return self._logits(hidden[torch.arange(len(prompts), device=device), last])

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
        embeds = self._phi.phi.embed_tokens(tokens)[:, None]
        hidden = self._phi(embeds, positions[:, None], DecodeStep(self.slots, positions, length))
        return self._logits(hidden[:, 0])

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        normed = self._phi.phi.final_layernorm(hidden)
        return self.model.lm_head(normed).float() + self._forbidden
