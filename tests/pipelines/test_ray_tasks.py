"""Calls as tasks of Ray: every one is done once, more are handed in than run, and errors arrive as they were raised."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray

from pipelines.preparation.sources import PlanError
from pipelines.ray_tasks import as_done, carried

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_session")]


@carried
def divide(number: int, by: int, table: list[int]) -> int:
    if by == 0:
        raise PlanError(f"call {number} divides by zero")
    return table[number] // by


def test_all_calls_are_made_once_and_as_there_is_room() -> None:
    taken = []

    def calls() -> Iterator[tuple[int, int]]:
        for number in range(100):
            taken.append(number)
            yield number, 2

    done = as_done(divide, calls(), ([10 * number for number in range(100)],), num_cpus=1)
    results = [next(done)]
    assert len(taken) <= 2 * ray.cluster_resources()["CPU"] + 2
    results += done
    assert sorted(results) == [5 * number for number in range(100)]


def test_what_a_call_raises_arrives_as_it_was_raised() -> None:
    done = as_done(divide, [(1, 1), (2, 0), (3, 1)], ([0] * 4,), num_cpus=1)
    with pytest.raises(PlanError, match=r"^call 2 divides by zero$"):
        list(done)
