"""An accelerator that fails is given to new workers, a few times and not for ever."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pipelines.encode import EncoderError
from pipelines.ray_tasks import retried
from pipelines.shards.receipts import Receipt


class Rounds:
    """Chunks in rounds: each does so many of those that are left, and then fails, or ends if none is left."""

    def __init__(self, num_chunks: int, done_before_failure: list[int]) -> None:
        self.left = list(range(num_chunks))
        self.limits = list(done_before_failure)
        self.rounds = 0

    def __call__(self) -> Iterator[Receipt]:
        self.rounds += 1
        limit = self.limits.pop(0) if self.limits else len(self.left)
        for _ in range(min(limit, len(self.left))):
            yield Receipt(plan="p", chunk=self.left.pop(0), planned=1, keys="", shard=None, quarantined=[])
        if self.left:
            raise EncoderError("encoder: the tower of x failed on cuda: CUDA error: unspecified launch failure")


def test_passing_failure_costs_nothing_but_time(capsys: pytest.CaptureFixture[str]) -> None:
    rounds = Rounds(6, [2, 0])
    assert [receipt.chunk for receipt in retried(rounds)] == list(range(6))
    assert rounds.rounds == 3
    assert "unspecified launch failure; trying again with new workers (2 of 2)" in capsys.readouterr().out


def test_failure_that_stays_is_an_error() -> None:
    rounds = Rounds(6, [2, 0, 0, 0])
    done = []
    with pytest.raises(EncoderError, match="CUDA error"):
        done.extend(receipt.chunk for receipt in retried(rounds))
    assert rounds.rounds == 3 and rounds.left == [2, 3, 4, 5]


def test_progress_between_failures_starts_the_count_anew() -> None:
    rounds = Rounds(6, [1, 1, 1, 1, 1])
    assert [receipt.chunk for receipt in retried(rounds)] == list(range(6))
