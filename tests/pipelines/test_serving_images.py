"""Images are encoded once, in batches, and kept within a budget."""

from __future__ import annotations

import torch

from flashsloth import FlashSlothForConditionalGeneration
from flashsloth.image_processing_flashsloth import normalize_pixels
from pipelines.serving.images import ImageStore
from pipelines.serving.prompts import Encoder, Prompt
from tests.fixtures.tiny import build_processor, build_tiny_model
from tests.prompts import conversation, picture


def setting() -> tuple[FlashSlothForConditionalGeneration, list[Prompt]]:
    """A model, and prompts about the pictures 0, 1, 2, 0 and none."""
    processor = build_processor()
    encoder = Encoder(processor)
    prompts = [encoder.prompt(conversation("What?"), picture(seed)) for seed in (0, 1, 2, 0)]
    return build_tiny_model(processor), [*prompts, encoder.prompt(conversation("What?"))]


@torch.inference_mode()
def test_images_come_as_the_model_encodes_them_in_the_order_of_the_prompts() -> None:
    model, prompts = setting()
    store = ImageStore(model, 10**9)
    for _ in range(2):
        encoded = store.encode(prompts)
        assert encoded is not None
        for index, prompt in enumerate(prompts[:4]):
            alone = model.get_image_features(normalize_pixels(torch.from_numpy(prompt.pixel_values[None])))
            torch.testing.assert_close(encoded.last_hidden_state[index], alone.last_hidden_state[0])
            torch.testing.assert_close(encoded.pooler_output[index], alone.pooler_output[0])
    assert (store.num_encoded, store.num_hits) == (3, 5)
    assert store.encode(prompts[4:]) is None


@torch.inference_mode()
def test_those_asked_about_last_are_kept() -> None:
    model, prompts = setting()
    store = ImageStore(model, 10**9)
    store.encode(prompts[:1])
    size = store.num_bytes
    store = ImageStore(model, 2 * size)
    for prompt in (prompts[0], prompts[1], prompts[0], prompts[2]):
        store.encode([prompt])
        assert store.num_bytes <= 2 * size
    kept = [prompt.image_key in store for prompt in prompts[:3]]
    assert kept == [True, False, True]
    store.encode(prompts)  # three at once, of which two can stay
    assert (store.num_bytes, store.num_encoded) == (2 * size, 4)
    store.clear()
    assert store.num_bytes == 0
    assert prompts[0].image_key not in store


@torch.inference_mode()
def test_without_a_budget_nothing_is_kept_but_a_batch_still_shares() -> None:
    model, prompts = setting()
    store = ImageStore(model, 0)
    for _ in range(2):
        store.encode(prompts)
    assert (store.num_bytes, store.num_encoded, store.num_hits) == (0, 6, 2)


@torch.inference_mode()
def test_what_is_kept_does_not_hold_its_batch_in_memory() -> None:
    model, prompts = setting()
    store = ImageStore(model, 10**9)
    store.encode(prompts)
    for image in store._kept.values():
        assert image.patches.untyped_storage().nbytes() == image.patches.nbytes
        assert image.tokens.untyped_storage().nbytes() == image.tokens.nbytes


def test_the_key_is_the_content() -> None:
    _, prompts = setting()
    first, second, _, again, none = prompts
    assert first.image_key == again.image_key != second.image_key
    assert none.image_key is None
    pixels = first.pixel_values
    assert pixels is not None
    assert Prompt([], [], pixels.reshape(3, 1, *pixels.shape[2:])).image_key != first.image_key
    assert Prompt([], [], pixels, image_key="given").image_key == "given"
