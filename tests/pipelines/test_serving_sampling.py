"""Tokens are chosen row by row, whatever rows stand beside."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from pipelines.serving.sampling import NO_TOKEN, Draws, Sampling, choose_tokens


def logits(rows: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, 50, generator=torch.Generator().manual_seed(seed))


def draw(values: torch.Tensor, sampling: Sampling, count: int) -> list[int]:
    draws, drawn = Draws(sampling), []
    for _ in range(count):
        drawn += choose_tokens(values[None], [draws])
        draws.advance()
    return drawn


def test_the_likeliest_token_and_the_drawn_ones_stand_in_one_batch() -> None:
    values = logits(6)
    kinds = [Sampling(), Sampling(temperature=1, seed=1), Sampling(), Sampling(temperature=0.7, top_p=0.5, seed=2)]
    kinds += [Sampling(temperature=2, seed=3), Sampling(temperature=1, top_p=0.9, seed=4)]
    together = choose_tokens(values, [Draws(kind) for kind in kinds])
    assert together == [choose_tokens(values[i : i + 1], [Draws(kind)])[0] for i, kind in enumerate(kinds)]
    assert [together[0], together[2]] == values.argmax(1)[[0, 2]].tolist()


def test_draws_follow_the_distribution() -> None:
    values = torch.tensor([2.0, 1.0, 0.0, -torch.inf])
    drawn = draw(values, Sampling(temperature=1.0, seed=0), 4000)
    shares = torch.bincount(torch.tensor(drawn), minlength=4) / len(drawn)
    assert shares[3] == 0
    torch.testing.assert_close(shares, values.softmax(0), atol=0.03, rtol=0)


def test_the_nucleus_is_the_smallest_set_that_holds_top_p() -> None:
    values = torch.tensor([0.1, 0.5, 0.15, 0.25]).log()
    assert set(draw(values, Sampling(temperature=1.0, top_p=0.7, seed=0), 200)) == {1, 3}
    assert set(draw(values, Sampling(temperature=1.0, top_p=1e-9, seed=0), 20)) == {1}


def test_a_temperature_near_zero_takes_the_likeliest() -> None:
    values = logits(1)[0]
    assert set(draw(values, Sampling(temperature=1e-30, seed=0), 5)) == {int(values.argmax())}


def test_a_step_that_is_tried_again_draws_the_same() -> None:
    values, draws = logits(1), Draws(Sampling(temperature=5.0, seed=0))
    assert choose_tokens(values, [draws]) == choose_tokens(values, [draws])
    drawn = set()
    for _ in range(20):
        draws.advance()
        drawn |= set(choose_tokens(values, [draws]))
    assert len(drawn) > 1


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_without_a_finite_maximum_gets_no_token_and_the_others_theirs(broken: float, temperature: float) -> None:
    values = logits(3)
    values[1] = broken
    draws = [Draws(Sampling(temperature=temperature, top_p=0.9, seed=row)) for row in range(3)]
    tokens = choose_tokens(values, draws)
    assert tokens[1] == NO_TOKEN
    assert [tokens[0], tokens[2]] == choose_tokens(values[[0, 2]], [draws[0], draws[2]])


def test_one_number_that_is_none_spoils_its_row() -> None:
    values = logits(2)
    values[0, 7] = torch.nan
    assert choose_tokens(values, [Draws(Sampling())] * 2) == [NO_TOKEN, int(values[1].argmax())]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"stop": ("",)},
        {"deadline_s": 0.0},
        {"seed": 2**64},
        {"seed": -(2**63) - 1},
        {"seed": 1.5},
        {"seed": "x"},
        {"seed": True},
        {"stop": (1,)},
        {"stop": ("x" * 257,)},
        {"stop": None},
        {"max_tokens": 3.5},
        {"max_tokens": None},
        {"max_tokens": True},
        {"temperature": None},
        {"temperature": "1"},
        {"top_p": None},
        {"deadline_s": "1"},
    ],
)
def test_settings_that_make_no_sense_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.mark.parametrize("seed", [-(2**63), 0, 2**64 - 1])
def test_every_seed_that_is_taken_can_be_drawn_by(seed: int) -> None:
    draws = Draws(Sampling(temperature=1.0, seed=seed))
    assert 0 <= draws.number < 1


def test_a_stop_that_is_one_text_is_told_from_a_tuple_of_them() -> None:
    with pytest.raises(ValueError, match=r"stop is the string 'color'; give a tuple of texts, \('color',\)"):
        Sampling(stop="color")  # type: ignore[arg-type]  # the mistake that is to be named
