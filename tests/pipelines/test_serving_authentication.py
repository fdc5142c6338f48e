"""Tokens are known by their hashes only, and each client has a bucket of its own."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from pipelines.serving import authentication
from pipelines.serving.authentication import Clients, RateLimit, hash_token, new_token
from pipelines.serving.errors import ApiError
from pipelines.serving.settings import Policy


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def refusal(clients: Clients, header: str | None) -> str:
    with pytest.raises(ApiError) as caught:
        clients.authenticate(header, "10.0.0.1")
    assert caught.value.status == 401
    return caught.value.code


def test_a_token_names_its_client() -> None:
    mine, yours = new_token(), new_token()
    assert mine != yours
    assert len(mine) > 40
    clients = Clients({"me": hash_token(mine), "you": hash_token(yours)})
    assert clients.authenticate(f"Bearer {mine}", "10.0.0.1") == "me"
    assert clients.authenticate(f"bearer {yours}", "10.0.0.1") == "you"


def test_whatever_else_is_sent_is_refused() -> None:
    token = new_token()
    clients = Clients({"me": hash_token(token)})
    assert refusal(clients, None) == refusal(clients, token) == refusal(clients, f"Basic {token}") == "missing_token"
    assert refusal(clients, f"Bearer {token}x") == refusal(clients, f"Bearer {token[:-1]}") == "invalid_token"
    assert refusal(clients, f"Bearer {hash_token(token)}") == "invalid_token"  # who reads the settings has no token
    assert refusal(clients, "Bearer \u00e9") == "invalid_token"


def test_without_tokens_clients_are_known_by_their_address() -> None:
    assert Clients({}).authenticate(None, "10.0.0.1") == "10.0.0.1"


def test_a_token_itself_is_refused_where_a_hash_belongs() -> None:
    with pytest.raises(ValidationError, match="pattern"):
        Policy(tokens={"me": new_token()})


def test_a_bucket_holds_a_minutes_worth_and_fills_steadily() -> None:
    clock = Clock()
    limit = RateLimit(6, clock)
    for _ in range(6):
        limit.take("me")
    with pytest.raises(ApiError) as caught:
        limit.take("me")
    assert (caught.value.status, caught.value.retry_after_s) == (429, 10)
    limit.take("you")
    clock.now = 9.9
    with pytest.raises(ApiError):
        limit.take("me")
    clock.now = 19.9
    limit.take("me")
    with pytest.raises(ApiError):
        limit.take("me")
    clock.now = 1000.0
    for _ in range(6):
        limit.take("me")
    with pytest.raises(ApiError):
        limit.take("me")


def test_a_crowd_is_looked_through_a_few_times_and_not_for_each_of_its_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(authentication, "_MOST_BUCKETS", 10)
    looks: list[int] = []
    forget = RateLimit._forget
    monkeypatch.setattr(
        RateLimit, "_forget", lambda limit, now: (looks.append(len(limit._buckets)), forget(limit, now))
    )
    clock = Clock()
    limit = RateLimit(6, clock)
    for client in range(1000):
        limit.take(str(client))
    assert looks == [11, 23, 47, 95, 191, 383, 767]
    clock.now = 60.0
    for client in range(1000, 2000):
        limit.take(str(client))
    assert len(limit._buckets) == 1000, "who came within the last minute is known"


def test_clients_that_stay_away_are_forgotten() -> None:
    clock = Clock()
    limit = RateLimit(6, clock)
    for client in range(10_001):
        limit.take(str(client))
        clock.now += 0.1
    assert len(limit._buckets) < 1000
