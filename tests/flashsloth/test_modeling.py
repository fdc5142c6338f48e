"""The model as a whole: what goes in, what is refused, what no batching may change."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForImageTextToText, AutoProcessor

from flashsloth import FlashSlothConfig, FlashSlothForConditionalGeneration, FlashSlothModel, FlashSlothProcessor
from flashsloth.collation import collate
from flashsloth.modeling_flashsloth import PARTS, part_of
from tests.fixtures.tiny import build_processor, build_tiny_model

CONVERSATIONS = [
    (True, ["What color is the square?", "red .", "Is there a blue triangle on the left?"]),
    (True, ["How many circles are there?"]),
    (False, ["Is there a blue triangle?"]),
    (True, ["a", "b", "c", "d", "What color is the circle on the grey background?"]),
    (False, ["What color is the square?", "It is green .", "How many circles are there?", "two", "Yes?"]),
    (True, ["What color is the square above the green circle on the left?"]),
    (True, ["Is there a blue triangle?", "Yes, on the left .", "How many circles are there?", "two", "Red?"]),
    (True, ["The square is red . The square is red . The square is red . Is it?"]),
]


def messages_of(texts: list[str]) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


def samples_of(processor: FlashSlothProcessor, conversations: list = CONVERSATIONS, answer: str = "") -> list[dict]:
    torch.manual_seed(1)
    samples = []
    for has_image, texts in conversations:
        sample = processor.encode(messages_of([*texts, answer] if answer else texts), has_image)
        if has_image:
            sample["pixel_values"] = torch.randn(processor.image_processor.num_tiles, 3, 126, 126)
        samples.append(sample)
    return samples


@pytest.fixture(scope="module", params=["base", "hd"])
def processor(request: pytest.FixtureRequest) -> FlashSlothProcessor:
    return build_processor(request.param)


@pytest.fixture(scope="module")
def model(processor: FlashSlothProcessor) -> FlashSlothForConditionalGeneration:
    return build_tiny_model(processor)


def batch_of(processor: FlashSlothProcessor, samples: list[dict], side: str = "right") -> dict[str, torch.Tensor]:
    return collate(samples, processor.pad_token_id, padding_side=side)


def generate(model: FlashSlothForConditionalGeneration, batch: dict[str, torch.Tensor], **options: object) -> list:
    batch = {name: value for name, value in batch.items() if name != "labels"}
    tokens = model.generate(**batch, max_new_tokens=8, **({"do_sample": False} | options))
    return tokens[:, batch["input_ids"].shape[1] :].tolist()


def cut(tokens: list[int], model: FlashSlothForConditionalGeneration) -> list[int]:
    end = model.config.eos_token_id
    return tokens[: tokens.index(end) + 1] if end in tokens else tokens


def test_greedy_decoding_does_not_depend_on_the_batch(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor
) -> None:
    """Fault 3: the published spans are not shifted by left padding."""
    samples = samples_of(processor)
    assert len({len(s["input_ids"]) for s in samples}) == 8, "8 different lengths"
    alone = [cut(generate(model, batch_of(processor, [s], "left"))[0], model) for s in samples]
    together = [cut(tokens, model) for tokens in generate(model, batch_of(processor, samples, "left"))]
    assert together == alone
    assert len({tuple(tokens) for tokens in alone}) > 4, "a model that always says the same would prove nothing"


@pytest.mark.parametrize("shift", [1, 7])
def test_left_padding_moves_nothing(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, shift: int
) -> None:
    """Spans follow from question_ids, wherever the row stands (faults 2 and 3)."""
    (sample,) = samples_of(processor, CONVERSATIONS[3:4])
    batch = batch_of(processor, [sample])
    padded = {
        name: torch.nn.functional.pad(batch[name], (shift, 0), value=processor.pad_token_id if "input" in name else 0)
        for name in ("input_ids", "attention_mask", "question_ids")
    }
    with torch.no_grad():
        plain = model(**batch).logits
        moved = model(**padded, pixel_values=batch["pixel_values"]).logits[:, shift:]
    torch.testing.assert_close(moved, plain, atol=1e-4, rtol=0)


def test_the_image_and_the_question_both_matter(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor
) -> None:
    """A span wrongly guessed would show in the answer, so what EmbQ reads must move the logits."""
    (sample,) = samples_of(processor, CONVERSATIONS[:1])
    batch = batch_of(processor, [sample])
    with torch.no_grad():
        plain = model(**batch).logits[0, -1]
        unasked = batch["question_ids"] * 1
        words = ((unasked == 2) & (batch["input_ids"] != processor.query_token_id)).nonzero()[1:, 1]
        unasked[0, words] = 0
        other_question = model(**batch | {"question_ids": unasked}).logits[0, -1]
        other_image = model(**batch | {"pixel_values": batch["pixel_values"] + 1.0}).logits[0, -1]
    assert not torch.allclose(plain, other_question, atol=1e-4)
    assert not torch.allclose(plain, other_image, atol=1e-4)


def test_results_do_not_depend_on_the_micro_batch(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor
) -> None:
    """Fault 1: the published code takes fewer than 20 rows for chats and more for captions."""
    caption = [processor.encode(messages_of(["", "a red square ."]), True, layout="caption") for _ in range(24)]
    for number, sample in enumerate(caption):
        torch.manual_seed(number)
        sample["pixel_values"] = torch.randn(processor.image_processor.num_tiles, 3, 126, 126)
    for samples in (samples_of(processor, CONVERSATIONS * 3, answer="red ."), caption):
        with torch.no_grad():
            many = model(**batch_of(processor, samples))
            few = [model(**batch_of(processor, samples[i : i + 3])) for i in range(0, 24, 3)]
        real = batch_of(processor, samples)["attention_mask"].bool()
        row = 0
        for part in few:
            for logits in part.logits:
                length = int(real[row].sum())
                torch.testing.assert_close(logits[:length], many.logits[row, :length], atol=1e-4, rtol=0)
                row += 1


def test_the_loss_can_be_counted_over_a_larger_batch(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor
) -> None:
    samples = samples_of(processor, answer="red .")
    counts = [sum(label != -100 for label in s["labels"]) for s in samples]
    whole = model(**batch_of(processor, samples)).loss
    parts = [
        model(**batch_of(processor, samples[i : i + 4]), num_items_in_batch=sum(counts)).loss for i in range(0, 8, 4)
    ]
    torch.testing.assert_close(sum(parts), whole, atol=1e-5, rtol=0)


def test_patch_features_stand_for_pixels(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor
) -> None:
    batch = batch_of(processor, samples_of(processor, answer="red ."))
    features = {k: v for k, v in batch.items() if k != "pixel_values"}
    features["patch_features"] = model.get_patch_features(batch["pixel_values"])
    assert features["patch_features"].shape == (6, model.config.num_tiles, 81, 48)
    assert torch.equal(model(**features).logits, model(**batch).logits)
    assert torch.equal(model(**features).loss, model(**batch).loss)
    left = batch_of(processor, samples_of(processor), "left")
    with_features = {k: v for k, v in left.items() if k != "pixel_values"}
    with_features["patch_features"] = model.get_patch_features(left["pixel_values"])
    assert generate(model, with_features) == generate(model, left)
    with pytest.raises(ValueError, match="2 of pixel_values, patch_features"):
        model(**features, pixel_values=batch["pixel_values"])


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_every_cache_gives_the_same_tokens(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, options: dict
) -> None:
    batch = batch_of(processor, samples_of(processor), "left")
    assert generate(model, batch, **options) == generate(model, batch)


def test_beams_sampling_and_how_often_images_are_encoded(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor
) -> None:
    batch = batch_of(processor, samples_of(processor), "left")
    towers: list[int] = []
    hook = model.model.vision_tower.register_forward_hook(lambda _, args, __: towers.append(len(args[0])))
    beams = generate(model, batch, num_beams=3)
    hook.remove()
    assert towers == [6 * model.config.num_tiles], "6 images, encoded once for all beams"
    alone = [generate(model, batch_of(processor, [s], "left"), num_beams=3)[0] for s in samples_of(processor)]
    assert [cut(b, model) for b in beams] == [cut(a, model) for a in alone]
    torch.manual_seed(0)
    first = generate(model, batch, do_sample=True, temperature=1.0)
    torch.manual_seed(0)
    assert generate(model, batch, do_sample=True, temperature=1.0) == first != generate(model, batch)


def test_the_cache_equals_the_whole_forward(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor
) -> None:
    (sample,) = samples_of(processor, CONVERSATIONS[:1])
    batch = batch_of(processor, [sample])
    with torch.no_grad():
        prefill = model(**batch, use_cache=True)
        step = model(input_ids=torch.tensor([[9]]), past_key_values=prefill.past_key_values, use_cache=True).logits
        longer = {
            k: torch.cat([v, torch.full((1, 1), f)], 1)
            for (k, v), f in zip(
                ((k, batch[k]) for k in ("input_ids", "attention_mask", "question_ids")), (9, 1, 0), strict=True
            )
        }
        whole = model(**longer, pixel_values=batch["pixel_values"]).logits[:, -1:]
    torch.testing.assert_close(step, whole, atol=1e-4, rtol=0)


def test_every_part_receives_gradients_the_tower_too(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor
) -> None:
    """Fault 4: the published tower runs without gradient, so that "HD trains the tower" does not hold of it."""
    model.zero_grad()
    model(**batch_of(processor, samples_of(processor, answer="red ."))).loss.backward()
    norms = dict.fromkeys(PARTS, 0.0)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        norms[part_of(name)] += float(parameter.grad.norm())
    assert all(norm > 1e-6 for norm in norms.values()), norms
    model.zero_grad()


def test_a_micro_batch_without_images_still_runs_every_module(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor
) -> None:
    samples = samples_of(processor, [c for c in CONVERSATIONS if not c[0]], answer="red .")
    text = batch_of(processor, samples)
    tiles = model.config.num_tiles
    empty = {"pixel_values": torch.zeros(0, tiles, 3, 126, 126), "patch_features": torch.zeros(0, tiles, 81, 48)}
    model.zero_grad()
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    try:
        plain = model(**text).loss
        for name, images in empty.items():
            loss = model(**text, **{name: images}).loss
            assert torch.equal(loss, plain)
            loss.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            if part_of(name) != "language_model" and part_of(name) != "query_tokens":
                assert not parameter.grad.any(), name
    finally:
        model.eval()
        model.zero_grad()
    towers: list[int] = []
    hook = model.model.vision_tower.register_forward_hook(lambda *_: towers.append(1))
    assert torch.equal(model(**text, pixel_values=empty["pixel_values"]).logits, model(**text).logits)
    hook.remove()
    assert not towers, "in evaluation text costs no tower forward (fault 6)"


def test_counts_that_do_not_match_are_refused_with_both_numbers(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor
) -> None:
    batch = batch_of(processor, samples_of(processor))
    per_image = model.config.num_image_tokens
    with pytest.raises(ValueError, match=f"{6 * per_image} image placeholders .* {5 * per_image} visual tokens"):
        model(**batch | {"pixel_values": batch["pixel_values"][:5]})
    with pytest.raises(ValueError, match=f"{6 * per_image} image placeholders .* 0 visual tokens"):
        model(**{k: v for k, v in batch.items() if k != "pixel_values"})
    with pytest.raises(ValueError, match="question_ids is missing"):
        model(**{k: v for k, v in batch.items() if k != "question_ids"})

    ids = batch["input_ids"].clone()
    first = (ids[0] == processor.query_token_id).nonzero()[0, 0]
    ids[0, first] = 5
    total = int((ids == processor.query_token_id).sum())
    with pytest.raises(ValueError, match=f"{total} query tokens are no whole number of turns of 9"):
        model(**batch | {"input_ids": ids})
    turns = batch["question_ids"].clone()
    turns[0, first] = 2
    with pytest.raises(ValueError, match=r"row 0, turn .*: .* query tokens carry this turn .* takes 9"):
        model(**batch | {"question_ids": turns})
    with pytest.raises(ValueError, match="question_ids has shape"):
        model(**batch | {"question_ids": turns[:, :-1]})
    with pytest.raises(ValueError, match=r"\[tiles, channels, height, width\] = .*126, 126"):
        model(**batch | {"pixel_values": batch["pixel_values"][..., :112]})

    moved = batch["input_ids"].clone()
    at = (moved[0] == processor.image_token_id).nonzero()[0, 0]
    moved[0, at], moved[2, 0] = 5, processor.image_token_id
    with pytest.raises(ValueError, match=f"row 0 has {per_image - 1} image placeholders"):
        model(**batch | {"input_ids": moved})


def test_text_alone_needs_no_question_ids(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor
) -> None:
    (sample,) = samples_of(processor, CONVERSATIONS[2:3])
    batch = batch_of(processor, [sample])
    without = {k: v for k, v in batch.items() if k != "question_ids"}
    assert torch.equal(model(**batch).logits, model(**without).logits)


def test_saved_and_loaded_it_is_the_same_model(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor, tmp_path: Path
) -> None:
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded, report = FlashSlothForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert {n: p.shape for n, p in loaded.named_parameters()} == {n: p.shape for n, p in model.named_parameters()}
    batch = batch_of(processor, samples_of(processor))
    torch.testing.assert_close(loaded.eval()(**batch).logits, model(**batch).logits, atol=1e-5, rtol=0)
    assert loaded.config.num_image_tokens == processor.num_image_tokens
    assert loaded.generation_config.suppress_tokens == [processor.image_token_id, processor.query_token_id]
    assert loaded.generation_config.eos_token_id == processor.eos_token_id
    assert isinstance(AutoModelForImageTextToText.from_pretrained(tmp_path), FlashSlothForConditionalGeneration)
    assert isinstance(AutoModel.from_pretrained(tmp_path), FlashSlothModel)
    assert isinstance(AutoProcessor.from_pretrained(tmp_path), FlashSlothProcessor)


def test_gradient_checkpointing_changes_nothing(
    model: FlashSlothForConditionalGeneration, processor: FlashSlothProcessor
) -> None:
    batch = batch_of(processor, samples_of(processor, answer="red ."))
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model.zero_grad()
        model(**batch, use_cache=False).loss.backward()
        grads.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    model.activation_checkpointing_disable()
    model.eval()
    model.zero_grad()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def count_parts(config: FlashSlothConfig) -> dict[str, int]:
    """Parameters of each part, counted on a model without memory."""
    with torch.device("meta"):
        model = FlashSlothForConditionalGeneration(config)
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    return counts


def test_the_full_size_model_has_the_published_number_of_parameters() -> None:
    """Counted from the shapes in the specification, part by part; the README's table is this one."""
    counts = count_parts(FlashSlothConfig.base())

    def linear(inputs: int, outputs: int) -> int:
        return inputs * outputs + outputs

    v, t, q = 1152, 2560, 576
    siglip_layer = 4 * linear(v, v) + linear(v, 4304) + linear(4304, v) + 2 * 2 * v
    phi_layer = 4 * linear(t, t) + linear(t, 4 * t) + linear(4 * t, t) + 2 * t
    assert counts == {
        "vision_tower": linear(3 * 14 * 14, v) + 27 * 27 * v + 26 * siglip_layer,
        "pooling": linear(v, v) + linear(v, 1),
        "projector": linear(v, t) + linear(t, t),
        "query_tokens": 9 * t,
        "embedded_query": linear(t, q) + linear(v, q) + linear(v, t) + 5 * linear(q, q) + linear(v, v) + 3 * 2 * q,
        "language_model": 51200 * t + 32 * phi_layer + 2 * t + linear(t, 51200),
    }
    assert round(sum(counts.values()) / 1e9, 1) == 3.2
    assert FlashSlothConfig.hd().num_image_tokens == 405


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"query_layer": 4}, "query_layer is 4, the language model has 4 layers"),
        ({"pooling_size": 2}, "9 patches a side cannot be pooled in squares of 2"),
        ({"query_hidden_size": 30}, "query_hidden_size 30 is not divisible by the 4 attention heads"),
        ({"image_token_id": 600}, "image_token_id is 600, the vocabulary has 512 entries"),
        ({"tiling": "odd"}, "'tiling' expected one of"),
        ({"num_query_tokens": "9"}, "'num_query_tokens' expected int"),
        ({"pooling_dropout": None}, "'pooling_dropout' with value None"),
    ],
)
def test_a_configuration_whose_parts_cannot_fit_is_refused(wrong: dict, message: str) -> None:
    with pytest.raises(Exception, match=message):
        FlashSlothConfig.tiny(**wrong)
