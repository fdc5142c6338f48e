"""Receipts are put many at a time, and entered as they come."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from pipelines import storage
from pipelines.preparation.ledger import Ledger
from pipelines.preparation.work_loop import work_off
from pipelines.shards.receipts import AccountingError, Receipt
from tests.pipelines.test_prepare_ledger import make_plan, make_receipt


def test_a_slow_store_gets_many_receipts_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(chunks=16)
    ledger = Ledger(str(tmp_path), plan, 0.5)
    together, put = Barrier(8, timeout=20), storage.put_if_absent

    def slow(uri: str, data: bytes) -> bool:
        together.wait()  # goes on where eight are here, and fails where no more come
        return put(uri, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "put_if_absent", slow)
        work_off(ledger, lambda pending: (make_receipt(str(tmp_path), plan, number) for number in pending))
    assert ledger.num_done == 32 and not ledger.pending and not Ledger(str(tmp_path), plan, 0.5).pending


def test_what_was_put_before_a_fault_is_kept(tmp_path: Path) -> None:
    plan = make_plan(chunks=4)

    def run(pending: list[int]) -> Iterator[Receipt]:
        for number in pending[:3]:
            wrong: dict[str, Any] = {"keys": "others"} if number == 2 else {}
            yield make_receipt(str(tmp_path), plan, number).model_copy(update=wrong)

    with pytest.raises(AccountingError, match="chunk 2"):
        work_off(Ledger(str(tmp_path), plan, 0.5), run)
    assert Ledger(str(tmp_path), plan, 0.5).pending == [2, 3]
