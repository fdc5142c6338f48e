import base64
import io
import pickle

import pytest
from PIL import Image

from flashsloth.conversation import ConversationError, Piece, caption_pieces, chat_pieces, read_conversation
from flashsloth.image_processing_flashsloth import ImageError


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def reason(function, *arguments):
    with pytest.raises(ConversationError) as caught:
        function(*arguments)
    return caught.value.reason


def chat(messages, has_image=False):
    return chat_pieces(messages, has_image, "Be kind.", " ")


def test_chat_with_an_image():
    assert chat([user("What?"), assistant("A bus."), user("Red?"), assistant("Yes")], has_image=True) == [
        Piece("text", "Be kind. USER:"),
        Piece("text", " "),
        Piece("image"),
        Piece("text", "\n"),
        Piece("text", "What? ", turn=1),
        Piece("query", turn=1),
        Piece("text", " ASSISTANT:"),
        Piece("text", " A bus.", learned=True),
        Piece("eos", learned=True),
        Piece("text", "USER:"),
        Piece("text", " Red? ", turn=2),
        Piece("query", turn=2),
        Piece("text", " ASSISTANT:"),
        Piece("text", " Yes", learned=True),
        Piece("eos", learned=True),
    ]


def test_chat_without_an_image_asks_from_the_first_token():
    assert chat([user("What?")]) == [
        Piece("text", "Be kind. USER:"),
        Piece("text", " What? ", turn=1),
        Piece("query", turn=1),
        Piece("text", " ASSISTANT:"),
    ]


def test_chat_without_a_system_text():
    assert chat_pieces([user("What?")], False, "", " ")[0] == Piece("text", "USER:")


def test_an_earlier_answer_of_a_prompt_may_be_empty():
    pieces = chat([user("a"), assistant(""), user("b")])
    place = pieces.index(Piece("eos"))
    assert pieces[place - 1 : place + 2] == [Piece("text", " ASSISTANT:"), Piece("eos"), Piece("text", "USER:")]


def test_caption_throws_the_instruction_away():
    assert caption_pieces([user("Describe."), assistant("a red bus")], has_image=True) == [
        Piece("image"),
        Piece("text", "a red bus", turn=1, learned=True),
        Piece("query", turn=1),
        Piece("text", "\n", learned=True),
    ]
    assert caption_pieces([user(""), assistant("a red bus")], has_image=True)[1].text == "a red bus"


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "conversation_empty"),
        ([assistant("Hi")], "role_order"),
        ([user("a"), user("b")], "role_order"),
        ([user("a"), assistant("b"), assistant("c")], "role_order"),
        ([{"role": "human", "content": "a"}], "role_order"),
        ([user("  \n")], "empty_question"),
        ([user("a"), assistant(" ")], "empty_answer"),
        ([user("a"), assistant("\u200b\ufeff \u2060\u200d")], "empty_answer"),
        ([user("a"), assistant(""), user("b"), assistant("c")], "empty_answer"),
        ([{"content": "a"}], "malformed_message"),
        ([{"role": "user", "content": None}], "malformed_message"),
    ],
)
def test_what_is_no_chat(messages, expected):
    assert reason(chat, messages) == expected


def test_a_system_message_is_refused_with_the_remedy():
    with pytest.raises(
        ConversationError,
        match=r"message 0 is 'system', not 'user'; the system text is the processor's.* first question",
    ):
        chat([{"role": "system", "content": "Be rude."}, user("a")])


@pytest.mark.parametrize(
    ("messages", "has_image", "expected"),
    [
        ([], True, "conversation_empty"),
        ([user("a")], True, "role_order"),
        ([user("a"), assistant("b"), user("c"), assistant("d")], True, "role_order"),
        ([user("a"), assistant("")], True, "empty_answer"),
        ([user("a"), assistant("\u200b\n")], True, "empty_answer"),
        ([user("a"), assistant("b")], False, "caption_without_image"),
    ],
)
def test_what_is_no_caption(messages, has_image, expected):
    assert reason(caption_pieces, messages, has_image) == expected


def test_the_error_crosses_processes():
    error = pickle.loads(pickle.dumps(ConversationError("too_long", "9 tokens; at most 8")))
    assert (error.reason, error.detail, str(error)) == (
        "too_long",
        "9 tokens; at most 8",
        "too_long: 9 tokens; at most 8",
    )


IMAGE = Image.new("RGB", (8, 8), "red")


def png():
    buffer = io.BytesIO()
    IMAGE.save(buffer, "PNG")
    return buffer.getvalue()


def data_uri():
    return "data:image/png;base64," + base64.b64encode(png()).decode()


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": IMAGE},
        {"type": "image", "image": png()},
        {"type": "image", "image": data_uri()},
        {"type": "image", "url": data_uri()},
        {"type": "image_url", "image_url": {"url": data_uri()}},
        {"type": "image_url", "image_url": {"url": data_uri().replace("data:", "DATA:", 1)}},
    ],
)
@pytest.mark.parametrize("image_first", [True, False])
def test_typed_content(part, image_first):
    text = {"type": "text", "text": "What <image>?"}
    parts = [part, text] if image_first else [text, part]
    messages, image = read_conversation([{"role": "user", "content": parts}, assistant("A square")])
    assert messages == [user("What <image>?"), assistant("A square")]
    assert image.getpixel((0, 0)) == (255, 0, 0)


def test_plain_content_and_several_texts():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert read_conversation([user("q"), assistant(parts)]) == ([user("q"), assistant("a\nb")], None)


@pytest.mark.parametrize(
    ("conversation", "expected"),
    [
        ([user([{"type": "image", "image": IMAGE}] * 2)], "image_misplaced"),
        ([user("q"), assistant("a"), user([{"type": "image", "image": IMAGE}])], "image_misplaced"),
        ([assistant([{"type": "image", "image": IMAGE}])], "image_misplaced"),
        ([user([{"type": "video", "video": "x"}])], "unsupported_content"),
        ([user([{"type": "image", "url": "http://169.254.169.254/"}])], "unsupported_content"),
        ([user([{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}])], "unsupported_content"),
        ([user([{"type": "image", "image": "/etc/passwd"}])], "unsupported_content"),
        ([user([{"type": "image"}])], "unsupported_content"),
        ([user(None)], "malformed_message"),
        ([user(["text"])], "malformed_message"),
        ([user([{"type": "text"}])], "unsupported_content"),
        ([{"role": "user"}], "malformed_message"),
        (["hello"], "malformed_message"),
    ],
)
def test_typed_content_that_is_refused(conversation, expected):
    assert reason(read_conversation, conversation) == expected


@pytest.mark.parametrize(
    "uri",
    [
        "data:image/png;base64,%%%",
        "data:image/png;base64,é",
        "data:image/png;base64,aGVsbG8=",
        "data:image/svg+xml,<svg/>",
    ],
)
def test_a_data_uri_that_holds_no_image(uri):
    with pytest.raises(ImageError, match=r"image_undecodable: message 0: ."):
        read_conversation([user([{"type": "image_url", "image_url": {"url": uri}}])])
