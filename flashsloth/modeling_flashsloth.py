"""FlashSloth (arXiv 2412.04317, CVPR 2025) on the SigLIP and Phi of transformers.

What is ours: spatial attention pooling, the query tokens, the embedded query module, and how they are wired. The
released code re-guesses turns and question spans inside `forward`; here they come in as `question_ids`.

Shapes: B rows, S positions, N images, T tiles, P patches of a tile, V vision width, D text width, Q query tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_outputs import BaseModelOutputWithPooling, ModelOutput
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import can_return_tuple

from .configuration_flashsloth import FlashSlothConfig
from .embedded_query import QueryPlan
from .language_model import FlashSlothTextModel
from .placeholders import check_images, count_turns, number_samples, plan_queries
from .pooling import SpatialAttentionPooling
from .vision import FlashSlothProjector, FlashSlothVisionTower

# The parts that recipes train, freeze or give a learning rate of their own, and what marks the names of their
# parameters. The first match counts: the embedded query module lives inside the language model.
PARTS: dict[str, tuple[str, ...]] = {
    "vision_tower": ("model.vision_tower.",),
    "pooling": ("model.pooling.",),
    "projector": ("model.projector.",),
    "query_tokens": ("model.query_tokens",),
    "embedded_query": (".embedded_query.",),
    "language_model": ("model.language_model.", "lm_head."),
}


def part_of(parameter_name: str) -> str:
    """The name in `PARTS` of the part that a parameter of `FlashSlothForConditionalGeneration` belongs to."""
    for part, marks in PARTS.items():
        if any(mark in parameter_name for mark in marks):
            return part
    raise ValueError(f"{parameter_name} belongs to no part of the model; the parts are {', '.join(PARTS)}")


@dataclass
class FlashSlothOutput(ModelOutput):
    """What the model returns.

    Attributes:
        loss: float[], mean over the loss tokens (or their sum over `num_items_in_batch`), where labels were given.
        logits: float[B, S, vocabulary] of the head. Absent from `FlashSlothModel`, and in training with labels.
        last_hidden_state: float[B, S, D].
        image_hidden_states: float[N, T * R, D], the visual tokens that entered the sequence.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None


class FlashSlothPreTrainedModel(PreTrainedModel):
    """Flags and initialisation shared by the model with and without its head."""

    config_class = FlashSlothConfig
    config: FlashSlothConfig
    base_model_prefix = "model"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules: list[str] = ["PhiDecoderLayer", "FlashSlothQueryLayer", "SiglipEncoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, FlashSlothModel):
            # The published start: Kaiming uniform with a = sqrt(5), as torch starts a linear layer.
            init.kaiming_uniform_(module.query_tokens, a=math.sqrt(5))


class FlashSlothModel(FlashSlothPreTrainedModel):
    """Tower, pooling, projector, query tokens and language model, without the head."""

    def __init__(self, config: FlashSlothConfig):
        super().__init__(config)
        self.vision_tower = FlashSlothVisionTower._from_config(config.vision_config)
        self.pooling = SpatialAttentionPooling(config)
        self.projector = FlashSlothProjector(config)
        self.query_tokens = nn.Parameter(torch.empty(config.num_query_tokens, config.text_config.hidden_size))
        self.language_model = FlashSlothTextModel._from_config(config.text_config, flashsloth=config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Phi's token embedding."""
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace Phi's token embedding."""
        self.language_model.embed_tokens = value

    def get_patch_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Run the tower alone: `pixel_values` float[N, T, 3, H, W] or [N, 3, H, W] to float[N, T, P, V].

        Raises:
            ValueError: the number of tiles or their size is not the configured one.
        """
        tiles = pixel_values[:, None] if pixel_values.dim() == 4 else pixel_values
        side = self.config.vision_config.image_size
        expected = (self.config.num_tiles, self.config.vision_config.num_channels, side, side)
        if tuple(tiles.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values has images of shape {tuple(tiles.shape[1:])}, this {self.config.tiling} model takes "
                f"[tiles, channels, height, width] = {expected}"
            )
        dtype = self.vision_tower.embeddings.patch_embedding.weight.dtype
        return self.vision_tower(tiles.flatten(0, 1).to(dtype)).last_hidden_state.unflatten(0, tiles.shape[:2])

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encode images: `last_hidden_state` float[N, T * P, V] for EmbQ, `pooler_output` float[N, T * R, D]."""
        return self.project_patches(self.get_patch_features(pixel_values))

    def project_patches(self, patch_features: torch.Tensor) -> BaseModelOutputWithPooling:
        """Encode images from what the tower makes of them, float[N, T, P, V]; returns as `get_image_features`.

        Raises:
            ValueError: the number of tiles, of patches or their width is not the configured one.
        """
        patches = patch_features[:, None] if patch_features.dim() == 3 else patch_features
        expected = (self.config.num_tiles, self.config.num_patches, self.config.vision_config.hidden_size)
        if tuple(patches.shape[1:]) != expected:
            raise ValueError(
                f"patch_features has images of shape {tuple(patches.shape[1:])}, this {self.config.tiling} model takes "
                f"[tiles, patches, width] = {expected}"
            )
        patches = patches.to(self.pooling.score_in.weight.dtype)
        tokens = self.projector(self.pooling(patches.flatten(0, 1)))
        return BaseModelOutputWithPooling(
            last_hidden_state=patches.flatten(1, 2),
            pooler_output=tokens.unflatten(0, patches.shape[:2]).flatten(1, 2),
        )

    def _encode_images(
        self,
        pixel_values: torch.Tensor | None,
        patch_features: torch.Tensor | None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None,
    ) -> tuple[BaseModelOutputWithPooling | None, bool]:
        """The encoded images, and whether they are only a stand-in for a micro-batch without any."""
        encoded = (mm_encoder_outputs or {}).get("image")
        given = sum(v is not None for v in (pixel_values, patch_features, encoded))
        if given > 1:
            raise ValueError(f"{given} of pixel_values, patch_features and mm_encoder_outputs were given: give one")
        images = pixel_values if pixel_values is not None else patch_features
        if images is None:
            return encoded, False
        absent = images.shape[0] == 0
        if absent and not self.training:
            return None, False
        # Without an image too every rank must run the same modules, or ranks with images wait for this one for ever.
        features = self.get_patch_features(images) if pixel_values is not None else images
        if absent:
            # One image of zeros for the small parts. Of the tower it holds an empty sum: its gradients are zeros.
            features = features.new_zeros((1, *features.shape[1:])) + features.sum()
        return self.project_patches(features), absent

    def embed(
        self,
        input_ids: torch.Tensor,
        image: BaseModelOutputWithPooling | None,
        absent: bool = False,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """Token embeddings with visual and query tokens at their placeholders: float[B, S, D].

        Args:
            input_ids: int64[B, S].
            image: what `get_image_features` gives for the images, row by row, or None without any.
            absent: `image` is a stand-in that no placeholder belongs to.
            device: of the model, where `input_ids` are not there: on the CPU, they are checked without waiting for what
                a GPU is still doing.
        """
        embed = self.get_input_embeddings()
        device = device or input_ids.device
        embeds = embed(input_ids.to(device))
        visual = None if image is None or absent else image.pooler_output
        image_mask = input_ids == self.config.image_token_id
        check_images(image_mask, visual, self.config.num_image_tokens)
        if visual is not None:
            embeds = embeds.masked_scatter(image_mask[..., None].to(device), visual.to(embeds.dtype))
        elif image is not None:
            embeds = embeds + 0.0 * image.pooler_output.to(embeds.dtype).mean()

        query_mask = input_ids == self.config.query_token_id
        turns = count_turns(query_mask, self.config.num_query_tokens)
        bias = embed(torch.full((1,), self.config.query_bias_token_id, device=device))
        queries = (self.query_tokens.to(embeds.dtype) + bias).repeat(max(turns, 1), 1)
        if turns:
            return embeds.masked_scatter(query_mask[..., None].to(device), queries)
        return embeds + 0.0 * queries.mean() if self.training else embeds

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        question_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> FlashSlothOutput:
        """Run the model up to the last norm; see `FlashSlothForConditionalGeneration.forward` for the arguments."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        image, absent = self._encode_images(pixel_values, patch_features, mm_encoder_outputs)
        sample_ids = None
        if position_ids is not None and attention_mask is None and past_key_values is None:
            sample_ids = number_samples(position_ids)
        if sample_ids is not None and kwargs.setdefault("use_cache", False):
            raise ValueError("position_ids hold several samples a row: with use_cache they would attend to each other")
        plan = None
        if input_ids is not None:
            inputs_embeds = self.embed(input_ids, image, absent)
            if absent:
                plan = QueryPlan.idle(input_ids.shape[1], self.config.num_query_tokens, input_ids.device)
            elif image is not None:
                plan = plan_queries(input_ids, question_ids, self.config, sample_ids)
        elif image is not None:
            raise ValueError("images come with input_ids, whose placeholders say where they stand; got inputs_embeds")
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            sample_ids=sample_ids,
            query_plan=plan,
            patches=None if image is None else image.last_hidden_state,
            **kwargs,
        )
        return FlashSlothOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=None if image is None or absent else image.pooler_output,
        )


class FlashSlothForConditionalGeneration(FlashSlothPreTrainedModel, GenerationMixin):
    """FlashSloth with its language-model head: what is trained, generates, and is saved."""

    def __init__(self, config: FlashSlothConfig):
        super().__init__(config)
        self.model = FlashSlothModel(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=True)
        # Placeholders are structure: an answer that contained one could not be read back by this model.
        self.generation_config.suppress_tokens = [config.image_token_id, config.query_token_id]
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """Phi's token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace Phi's token embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def get_patch_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The tower alone; see `FlashSlothModel.get_patch_features`."""
        return self.model.get_patch_features(pixel_values)

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Encoded images; see `FlashSlothModel.get_image_features`."""
        return self.model.get_image_features(pixel_values, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        question_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        patch_features: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        **kwargs: Any,
    ) -> FlashSlothOutput:
        """Compute logits and, with labels, the loss.

        Args:
            input_ids: int64[B, S], placeholders expanded: `num_image_tokens` an image, `num_query_tokens` a turn.
            attention_mask: int64[B, S], 0 at padding on either side.
            labels: int64[B, S], -100 where there is no loss. In training the head then runs only where there is one,
                and no logits are returned.
            question_ids: int64[B, S], k at the question and query tokens of turn k, else 0. Needed with images.
            pixel_values: float[N, T, 3, H, W] or, untiled, float[N, 3, H, W]: one entry an image, in order of
                appearance, row by row. In training, N = 0 says "no image in this micro-batch": the tower then runs on
                nothing and the small image parts once on zeros, without effect, so that ranks of one job stay in step.
            patch_features: float[N, T, P, V], what the tower makes of `pixel_values`, instead of them.
            position_ids: int64[B, S]. Without `attention_mask`, a row may hold several packed samples, each counted
                from 0: they attend to themselves alone, and their questions and images stay apart.
            past_key_values: keys and values of earlier positions.
            inputs_embeds: float[B, S, D] instead of `input_ids`, for text alone.
            logits_to_keep: compute the logits of the last positions only (0: all).
            mm_encoder_outputs: images encoded by `get_image_features`, as `generate` passes them.
            **kwargs: `num_items_in_batch` (the loss is the sum over this many tokens instead of the mean), and what
                attention implementations take.

        Raises:
            ValueError: placeholders, features, query tokens and turns do not match in number.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            question_ids=question_ids,
            pixel_values=pixel_values,
            patch_features=patch_features,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            mm_encoder_outputs=mm_encoder_outputs,
            **kwargs,
        )
        hidden_states, vocab_size = outputs.last_hidden_state, self.config.text_config.vocab_size
        if labels is not None and self.training:
            foreseen = nn.functional.pad(labels[:, 1:], (0, 1), value=-100)  # what each position shall foresee
            learned = foreseen != -100
            logits = self.lm_head(hidden_states[learned])
            outputs.loss = self.loss_function(
                logits=logits, labels=None, shift_labels=foreseen[learned], vocab_size=vocab_size, **kwargs
            )
            return outputs
        outputs.logits = self.lm_head(slice_logits_to_keep(hidden_states, logits_to_keep))
        if labels is not None:
            outputs.loss = self.loss_function(logits=outputs.logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return outputs

    def prepare_inputs_for_generation(
        self, *args: Any, is_first_iteration: bool | None = False, **kwargs: Any
    ) -> dict[str, Any]:
        """Images and questions are read in the prefill; afterwards they live in the cache."""
        inputs = super().prepare_inputs_for_generation(*args, is_first_iteration=is_first_iteration, **kwargs)
        if is_first_iteration:
            return inputs
        if kwargs.get("use_cache", True):
            inputs.pop("question_ids", None)
            inputs.pop("patch_features", None)
        elif inputs.get("question_ids") is not None:
            answered = inputs["input_ids"].shape[1] - inputs["question_ids"].shape[1]
            inputs["question_ids"] = nn.functional.pad(inputs["question_ids"], (0, answered))
        return inputs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, **kwargs: Any
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        # transformers repeats the pooled tokens of encoded images for beams, but not the patches that EmbQ reads.
        encoded = (kwargs.get("mm_encoder_outputs") or {}).get("image")
        if encoded is not None and expand_size > 1:
            encoded.last_hidden_state = encoded.last_hidden_state.repeat_interleave(expand_size, dim=0)
        return super()._expand_inputs_for_generation(expand_size=expand_size, **kwargs)


__all__ = ["FlashSlothForConditionalGeneration", "FlashSlothModel", "FlashSlothPreTrainedModel"]
