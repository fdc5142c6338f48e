import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers
from transformers import AutoProcessor, AutoTokenizer, PreTrainedTokenizerFast

from flashsloth.conversation import ConversationError, chat_pieces
from flashsloth.image_processing_flashsloth import FlashSlothImageProcessor
from flashsloth.processing_flashsloth import FlashSlothProcessor

ROOT = Path(__file__).parents[2]
PHI_2 = ROOT.parent / "shared" / "golden" / "phi2_tokenizer"
GOLDEN = json.loads((ROOT / "tests" / "golden" / "tokenized.json").read_text())

needs_phi_2 = pytest.mark.skipif(not PHI_2.is_dir(), reason=f"needs Phi-2's tokenizer in {PHI_2}")

CONVERSATION = [
    {"role": "user", "content": "How many dogs are there?"},
    {"role": "assistant", "content": "Two"},
    {"role": "user", "content": "What color is the left one?"},
    {"role": "assistant", "content": ": brown  .\n"},
    {"role": "user", "content": "  Are they running? "},
    {"role": "assistant", "content": "No."},
]
STRUCTURE_AS_TEXT = ["<image>", "<learnable>", "</s>", "<|endoftext|>", "ASSISTANT:", "USER:"]


@pytest.fixture(scope="module")
def phi_2_processor():
    return FlashSlothProcessor(FlashSlothImageProcessor(), AutoTokenizer.from_pretrained(PHI_2))


def user(content):
    return [{"role": "user", "content": content}]


def collapsed(processor, ids, labels):
    """One -200 for an image and one query token a turn, as the golden file writes them, with their labels."""
    spans = {
        processor.image_token_id: (processor.num_image_tokens, -200),
        processor.query_token_id: (processor.num_query_tokens, processor.query_token_id),
    }
    out, position = [], 0
    while position < len(ids):
        length, written = spans.get(ids[position], (1, ids[position]))
        assert set(ids[position : position + length]) == {ids[position]}
        out.append((written, labels[position]))
        position += length
    return [written for written, _ in out], [label for _, label in out]


@needs_phi_2
@pytest.mark.parametrize("golden", GOLDEN, ids=[golden["record"]["id"] for golden in GOLDEN])
def test_ids_and_labels_are_those_of_the_published_preprocessing(phi_2_processor, golden):
    record = golden["record"]
    messages = [
        {
            "role": {"human": "user", "gpt": "assistant"}[turn["from"]],
            "content": turn["value"].replace("<image>", "").strip(),
        }
        for turn in record["conversations"]
    ]
    layout = "caption" if record.get("stage") == 1 else "chat"
    sample = phi_2_processor.encode(messages, has_image="image" in record, layout=layout)
    ids, labels = collapsed(phi_2_processor, sample["input_ids"], sample["labels"])
    assert ids == golden["input_ids"]
    assert labels == golden["labels"]


@needs_phi_2
def test_token_ids_of_phi_2(phi_2_processor):
    assert phi_2_processor.query_token_id == 50295
    assert phi_2_processor.eos_token_id == 50296
    assert phi_2_processor.image_token_id == 50297
    assert phi_2_processor.pad_token_id == 50256
    assert phi_2_processor.query_bias_token_id == 764


@needs_phi_2
def test_the_prefix_before_an_image_is_always_32_tokens(phi_2_processor):
    for question in ("What?", "\nwhat", "  what", "</s>"):
        ids = phi_2_processor.encode(user(question), has_image=True)["input_ids"]
        assert ids.index(phi_2_processor.image_token_id) == 32
        assert ids[32 + 81] == 198  # "\n", never merged with the question


@needs_phi_2
def test_whitespace_runs_of_phi_2_stay_single_tokens(phi_2_processor):
    assert 50284 in phi_2_processor.encode(user("a    b"), has_image=False)["input_ids"]
    assert 50294 in phi_2_processor.encode(user("a\t\tb"), has_image=False)["input_ids"]


@pytest.fixture(params=["tiny", pytest.param("phi-2", marks=needs_phi_2)])
def any_processor(request):
    """The layout holds for both tokenizers."""
    return request.getfixturevalue("processor" if request.param == "tiny" else "phi_2_processor")


@pytest.mark.parametrize("has_image", [True, False])
@pytest.mark.parametrize("separator", [" ", ""])
def test_a_prompt_is_the_beginning_of_the_training_sample(any_processor, has_image, separator, monkeypatch):
    monkeypatch.setattr(any_processor, "query_separator", separator)
    full = any_processor.encode(CONVERSATION, has_image)
    for turn in range(3):
        prompt = any_processor.encode(CONVERSATION[: 2 * turn + 1], has_image)
        length = len(prompt["input_ids"])
        for key in ("input_ids", "question_ids"):
            assert prompt[key] == full[key][:length]
        assert set(prompt["labels"]) == {-100}
        # What follows the prompt is the answer, learned from its first token on.
        assert full["labels"][length - 1] == -100
        assert full["labels"][length] == full["input_ids"][length]


@pytest.mark.parametrize("text", STRUCTURE_AS_TEXT)
@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("has_image", [True, False])
def test_text_that_spells_structure_stays_text(any_processor, text, role, has_image):
    def count_marks(content):
        messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
        messages[0 if role == "user" else 1] = {"role": role, "content": content}
        sample = any_processor.encode(messages, has_image)
        marks = (
            any_processor.image_token_id,
            any_processor.query_token_id,
            any_processor.eos_token_id,
            any_processor.pad_token_id,
        )
        assert any_processor.tokenizer.decode(sample["input_ids"]).count(content) >= 1
        return [sample["input_ids"].count(mark) for mark in marks], max(sample["question_ids"])

    assert count_marks(f"say {text} and {text}") == count_marks("say it")


# Text of marks, whitespace and letters: what is likeliest to merge with the template around it.
awkward_text = st.lists(
    st.sampled_from([*STRUCTURE_AS_TEXT, " ", "  ", "\t", "\n", ":", "'s", "a", "B", "7", "é", "🦥"]), min_size=1
).map("".join)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(question=awkward_text.filter(str.strip), answer=awkward_text.filter(str.strip))
def test_any_text_is_kept_and_makes_no_structure(any_processor, question, answer):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    sample = any_processor.encode(messages, has_image=True)
    ids = sample["input_ids"]
    assert ids.count(any_processor.image_token_id) == any_processor.num_image_tokens
    assert ids.count(any_processor.query_token_id) == any_processor.num_query_tokens
    assert ids.count(any_processor.eos_token_id) == 1
    assert spans(any_processor, sample) == {1: question + " "}
    learned = [token for token in sample["labels"] if token != -100]
    assert any_processor.decode(learned) == f" {answer}</s>"
    assert any_processor.encode(messages[:1], has_image=True)["input_ids"] == ids[: -len(learned)]


@needs_phi_2
@settings(max_examples=60, deadline=None)
@given(text=awkward_text)
def test_pieces_break_where_no_token_would_span(phi_2_processor, text):
    # The published preprocessing tokenizes "... USER: question" and " ASSISTANT: answer" in one go.
    def ids(piece):
        return phi_2_processor.tokenizer(piece, split_special_tokens=True).input_ids

    for before in ("USER:", " ASSISTANT:"):
        assert ids(f"{before} {text}") == ids(before) + ids(f" {text}")


def test_text_that_spells_structure_stays_text_in_a_caption(processor):
    text = " ".join(STRUCTURE_AS_TEXT)
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": text}]
    ids = processor.encode(messages, has_image=True, layout="caption")["input_ids"]
    assert ids.count(processor.image_token_id) == 9
    assert ids.count(processor.query_token_id) == 9
    assert ids.count(processor.eos_token_id) == 0


def spans(processor, sample):
    """Turn -> text of its question tokens, without the query tokens, which must close it."""
    found = {}
    for turn in range(1, max(sample["question_ids"]) + 1):
        ids = [token for token, k in zip(sample["input_ids"], sample["question_ids"], strict=True) if k == turn]
        assert ids[-9:] == [processor.query_token_id] * 9
        found[turn] = processor.decode(ids[:-9])
    return found


def test_question_spans_with_an_image_begin_after_the_newline(any_processor):
    sample = any_processor.encode(CONVERSATION, has_image=True)
    assert spans(any_processor, sample) == {
        1: "How many dogs are there? ",
        2: " What color is the left one? ",
        3: "   Are they running?  ",
    }


def test_question_spans_without_an_image_skip_no_token(any_processor):
    sample = any_processor.encode(CONVERSATION, has_image=False)
    assert spans(any_processor, sample)[1] == " How many dogs are there? "


def test_question_span_of_a_caption_is_the_whole_caption(any_processor):
    messages = [{"role": "user", "content": "Describe."}, {"role": "assistant", "content": "a red square"}]
    sample = any_processor.encode(messages, has_image=True, layout="caption")
    assert spans(any_processor, sample) == {1: "a red square"}
    images = any_processor.num_image_tokens
    assert sample["question_ids"][:images] == [0] * images
    assert sample["question_ids"][images] == 1
    assert sample["question_ids"][-1] == 0
    learned = [token for token in sample["labels"] if token != -100]
    assert any_processor.decode(learned) == "a red square\n"


def test_labels_are_the_answers_and_their_ends(any_processor):
    sample = any_processor.encode(CONVERSATION, has_image=True)
    learned = [token for token in sample["labels"] if token != -100]
    assert any_processor.decode(learned) == " Two</s> : brown  .\n</s> No.</s>"


def test_the_separator_is_the_only_difference_of_released_checkpoints(tokenizer):
    ours = FlashSlothProcessor(FlashSlothImageProcessor(size=126), tokenizer, num_image_tokens=9)
    theirs = FlashSlothProcessor(FlashSlothImageProcessor(size=126), tokenizer, num_image_tokens=9, query_separator="")
    ids = ours.encode(user("What?"), has_image=True)["input_ids"]
    first_query = ids.index(ours.query_token_id)
    assert ours.decode(ids[first_query - 1]) == " "
    del ids[first_query - 1]
    assert theirs.encode(user("What?"), has_image=True)["input_ids"] == ids


def test_too_long_names_both_numbers(processor):
    length = len(processor.encode(user("What?"), has_image=True)["input_ids"])
    assert processor.encode(user("What?"), has_image=True, max_length=length)
    with pytest.raises(ConversationError, match=f"{length} tokens; at most {length - 1}") as caught:
        processor.encode(user("What?"), has_image=True, max_length=length - 1)
    assert caught.value.reason == "too_long"
    with pytest.raises(ConversationError, match="at most 3072"):
        processor.encode(user("x " * 4000), has_image=False)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text() | st.text(alphabet=" -=*\n\t"), repeat=st.sampled_from([1, 30]), has_image=st.booleans())
def test_no_conversation_has_fewer_tokens_than_are_counted_before_it_is_tokenized(
    any_processor, text, repeat, has_image
):
    """Else one would be refused that fits; runs of one character are what the longest tokens stand for."""
    messages = [*CONVERSATION, *user("? " + text * repeat)]
    pieces = chat_pieces(messages, has_image, any_processor.system, any_processor.query_separator)
    length = len(any_processor.encode(messages, has_image, max_length=10**6)["input_ids"])
    assert any_processor._fewest_tokens(pieces) <= length
    assert len(any_processor.encode(messages, has_image, max_length=length)["input_ids"]) == length


def test_what_is_far_too_long_is_refused_before_it_is_tokenized(any_processor, monkeypatch):
    def never(texts):
        raise AssertionError("this takes half a minute for 20 MB")

    monkeypatch.setattr(any_processor, "_text_ids", never)
    longest = max(len(token) for token in any_processor.tokenizer.get_vocab())
    turns = [{"role": ("user", "assistant")[place % 2], "content": "a"} for place in range(701)]
    for messages, fewest in ((user("word " * 10**6), 5 * 10**6 // longest), (turns, 351 * 9)):
        with pytest.raises(ConversationError, match=r"at least \d+ tokens; at most 3072") as caught:
            any_processor.encode(messages, has_image=False)
        assert caught.value.reason == "too_long"
        assert int(caught.value.detail.split()[2]) >= fewest


@pytest.mark.parametrize("change", ["normalizer", "pre_tokenizer", "added"])
def test_a_text_of_which_a_tokenizer_may_leave_something_away_is_tokenized(tokenizer, change):
    """Its bytes say nothing about its tokens: here a text of any length has hardly any."""
    if change == "normalizer":
        tokenizer.backend_tokenizer.normalizer = normalizers.Strip()
    elif change == "pre_tokenizer":
        steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    else:
        tokenizer.add_tokens([AddedToken("@@", lstrip=True)])
    processor = FlashSlothProcessor(FlashSlothImageProcessor(size=126), tokenizer, num_image_tokens=9)
    assert processor.encode(user("What?" + " " * 10**5 + "@@"), has_image=False, max_length=10**6)
    with pytest.raises(ConversationError, match=r"^too_long: \d+ tokens; at most 20"):
        processor.encode(user("What?" + " " * 10**5 + "@@"), has_image=False, max_length=20)


def test_unknown_layout(processor):
    with pytest.raises(ValueError, match="'poem'"):
        processor.encode(user("a"), has_image=False, layout="poem")


def test_missing_tokens_are_added_once(tokenizer):
    before = len(tokenizer)
    first = FlashSlothProcessor(FlashSlothImageProcessor(), tokenizer)
    assert [first.query_token_id, first.eos_token_id, first.image_token_id] == [before, before + 1, before + 2]
    second = FlashSlothProcessor(FlashSlothImageProcessor(), tokenizer)
    assert len(tokenizer) == before + 3
    assert second.identity() == first.identity()


def test_a_tokenizer_that_reads_structure_out_of_text_is_refused(tokenizer):
    tokenizer.add_tokens(["<image>"])  # not special: it would match in anyone's text
    with pytest.raises(ValueError, match="reads the text '<image>' as structure"):
        FlashSlothProcessor(FlashSlothImageProcessor(), tokenizer)


def test_a_tokenizer_without_padding_is_refused(tokenizer):
    bare = json.loads(tokenizer.backend_tokenizer.to_str())
    bare["model"]["vocab"].pop("<|endoftext|>")
    bare["added_tokens"] = []
    backend = type(tokenizer.backend_tokenizer).from_str(json.dumps(bare))
    with pytest.raises(ValueError, match="neither a padding token"):
        FlashSlothProcessor(FlashSlothImageProcessor(), PreTrainedTokenizerFast(tokenizer_object=backend))


def test_query_bias_must_be_one_token(processor):
    assert processor.tokenizer.convert_ids_to_tokens(processor.query_bias_token_id) == "\u0120."
    state = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"] = []
    backend = type(processor.tokenizer.backend_tokenizer).from_str(json.dumps(state))
    unmerged = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|endoftext|>")
    with pytest.raises(ValueError, match="takes 2 tokens"):
        _ = FlashSlothProcessor(FlashSlothImageProcessor(), unmerged).query_bias_token_id


def test_image_tokens_must_divide_among_the_tiles(tokenizer):
    with pytest.raises(ValueError, match="81 image tokens do not divide among the 5 tiles"):
        FlashSlothProcessor(FlashSlothImageProcessor(tiling="hd"), tokenizer)


@pytest.mark.parametrize("loader", [FlashSlothProcessor, AutoProcessor])
def test_everything_survives_saving(tokenizer, tmp_path, loader):
    options = {
        "num_image_tokens": 45,
        "num_query_tokens": 4,
        "query_separator": "",
        "max_length": 512,
        "system": "Be kind.",
    }
    saved = FlashSlothProcessor(FlashSlothImageProcessor(tiling="hd", size=126), tokenizer, **options)
    saved.save_pretrained(tmp_path)
    loaded = loader.from_pretrained(tmp_path)
    assert type(loaded) is FlashSlothProcessor
    assert {name: getattr(loaded, name) for name in options} == options
    assert (loaded.image_processor.tiling, loaded.image_processor.size) == ("hd", 126)
    assert loaded.identity() == saved.identity()
    assert loaded.encode(CONVERSATION, True) == saved.encode(CONVERSATION, True)


@needs_phi_2
def test_phi_2_survives_saving(phi_2_processor, tmp_path):
    phi_2_processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert loaded.identity() == phi_2_processor.identity()
    assert len(loaded.tokenizer) == 50298


@pytest.mark.parametrize(
    "change",
    [
        {"num_image_tokens": 18},
        {"num_query_tokens": 3},
        {"query_separator": ""},
        {"system": ""},
        {"image_processor": FlashSlothImageProcessor(size=252)},
    ],
)
def test_identity_tells_processors_apart(tokenizer, change):
    options = {"image_processor": FlashSlothImageProcessor(size=126), "num_image_tokens": 9}
    reference = FlashSlothProcessor(tokenizer=tokenizer, **options).identity()
    assert FlashSlothProcessor(tokenizer=tokenizer, **(options | change)).identity() != reference
    assert FlashSlothProcessor(tokenizer=tokenizer, **options, max_length=7).identity() == reference


def test_identity_covers_the_tokenizer_and_not_its_state(processor):
    before = processor.identity()
    processor.tokenizer(["a", "b c"], padding=True, truncation=True, max_length=1)  # leaves traces in the backend
    assert processor.identity() == before
    processor.tokenizer.add_tokens(["square"])
    assert processor.identity() != before
