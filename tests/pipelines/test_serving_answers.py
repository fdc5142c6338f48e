"""Text comes out piece by piece, and is the text that decoding everything at once gives."""

from __future__ import annotations

import functools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pipelines.serving.answers import Answer, Chunk, Transcript
from tests.fixtures.tiny import build_processor


@functools.cache
def backend() -> Tokenizer:
    return build_processor().tokenizer.backend_tokenizer


def ids_of(text: str) -> list[int]:
    return backend().encode(text, add_special_tokens=False).ids


def pieces(token_ids: list[int], stops: tuple[str, ...] = ()) -> list[str]:
    """What is released after each token, and at the end."""
    transcript, released = Transcript(backend(), stops), []
    for token_id in token_ids:
        stopped = transcript.push(token_id)
        if stopped:
            break
        released.append(transcript.release())
    return [*released, transcript.finish()]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 450), max_size=40))
def test_any_tokens_give_the_text_of_decoding_them_at_once(token_ids: list[int]) -> None:
    """Broken characters, special tokens and ids that the vocabulary does not have included."""
    assert "".join(pieces(token_ids)) == backend().decode(token_ids, skip_special_tokens=True).strip()


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet="ab \n", max_size=30),
    st.lists(st.text(alphabet="ab \n", min_size=1, max_size=4), max_size=3),
)
def test_the_text_ends_before_the_first_stop(text: str, stops: list[str]) -> None:
    found = [text.index(stop) for stop in stops if stop in text]
    token_ids = [token_id for letter in text for token_id in ids_of(letter)]
    released = pieces(token_ids, tuple(stops))
    if not found:
        assert "".join(released) == text.strip()
        return
    # It ends with the first stop that is complete, not with one that begins earlier and never comes to be.
    ends = [text.index(stop) + len(stop) for stop in stops if stop in text]
    seen = text[: min(ends)]
    assert "".join(released) == seen[: min(seen.index(stop) for stop in stops if stop in seen)].strip()


def test_a_possible_stop_is_held_back_and_let_go_when_it_is_none() -> None:
    released = pieces(ids_of("a") + ids_of("b") + ids_of("c"), ("bd",))
    assert released == ["a", "", "bc", ""]


def test_space_is_held_back_until_something_follows_and_never_ends_or_starts_an_answer() -> None:
    letters = [ids_of(letter)[0] for letter in " a b "]
    assert pieces(letters) == ["", "a", "", " b", "", ""]


def test_a_character_of_several_tokens_comes_whole() -> None:
    token_ids = ids_of("aé€")
    assert len(token_ids) == 6  # bytes, which this vocabulary does not join
    assert pieces(token_ids) == ["a", "", "é", "", "", "€", ""]
    assert pieces(token_ids[:-1]) == ["a", "", "é", "", "", "�"]


def test_chunks_join_into_an_answer() -> None:
    chunks = [Chunk([1, 2], "a"), Chunk([3], " b"), Chunk([4], "", "length")]
    assert Answer.join(chunks) == Answer([1, 2, 3, 4], "a b", "length")


@pytest.mark.parametrize("stop", ["aa", "aab"])
def test_an_overlap_is_found_anew_after_it_broke_off(stop: str) -> None:
    letters = [ids_of(letter)[0] for letter in "abaab"]
    assert "".join(pieces(letters, (stop,))) == "ab"
