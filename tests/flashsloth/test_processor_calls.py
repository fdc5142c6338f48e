"""The processor as callers outside meet it: images and messages in, batches and text out."""

import io

import pytest
import torch
from PIL import Image

from flashsloth.conversation import ConversationError


def user(content):
    return [{"role": "user", "content": content}]


def test_a_batch_of_prompts_is_padded_on_the_left(processor):
    red = Image.new("RGB", (20, 30), "red")
    long, short = user("How many red squares are there?"), user("Two?")
    batch = processor(images=[None, red, red], messages=[long, short, long])
    assert sorted(batch) == ["attention_mask", "input_ids", "pixel_values", "question_ids"]
    assert batch["pixel_values"].shape == (2, 1, 3, 126, 126)
    for row, (conversation, has_image) in enumerate([(long, False), (short, True), (long, True)]):
        expected = processor.encode(conversation, has_image)
        kept = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row, kept].tolist() == expected["input_ids"]
        assert batch["question_ids"][row, kept].tolist() == expected["question_ids"]
        assert kept[-1]
        assert set(batch["input_ids"][row, ~kept].tolist()) <= {processor.pad_token_id}


def test_one_conversation_alone(processor):
    red = Image.new("RGB", (20, 30), "red")
    assert processor(images=red, messages=user("What?"))["input_ids"].shape[0] == 1
    assert "pixel_values" not in processor(messages=user("What?"))
    with pytest.raises(ValueError, match="1 images for 2 conversations"):
        processor(images=red, messages=[user("a"), user("b")])
    with pytest.raises(ConversationError, match="conversation_empty"):
        processor(messages=[])


def test_chat_template_takes_typed_content_through_the_same_road(processor):
    red = Image.new("RGB", (20, 30), "red")
    buffer = io.BytesIO()
    red.save(buffer, "PNG")
    content = [{"type": "image", "image": buffer.getvalue()}, {"type": "text", "text": "What is <image>?"}]
    typed = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )
    plain = processor(images=red, messages=user("What is <image>?"))
    assert typed.keys() == plain.keys()
    for key in plain:
        assert torch.equal(typed[key], plain[key])


@pytest.mark.parametrize(
    "options",
    [{"tokenize": False}, {"return_dict": False}, {"return_tensors": "np"}, {"continue_final_message": True}],
)
def test_chat_template_has_no_string_form(processor, options):
    with pytest.raises(ValueError, match="only tokenize=True"):
        processor.apply_chat_template(user("a"), **options)


def test_the_generation_prompt_belongs_to_a_question(processor):
    with pytest.raises(ValueError, match="add_generation_prompt=False with a conversation that ends with the user"):
        processor.apply_chat_template(user("a"), add_generation_prompt=False)
    with pytest.raises(ValueError, match="ends with the assistant"):
        processor.apply_chat_template([*user("a"), {"role": "assistant", "content": "b"}])


def test_answers_come_without_special_tokens(processor):
    text = processor.tokenizer("  red , square .", split_special_tokens=True).input_ids
    rows = [[*text, processor.eos_token_id, processor.pad_token_id], [processor.eos_token_id] * 3]
    assert processor.post_process(rows) == ["red , square .", ""]
    literal = processor.tokenizer("the tag </s>", split_special_tokens=True).input_ids
    assert processor.post_process(torch.tensor([literal])) == ["the tag </s>"]
