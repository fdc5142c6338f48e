"""From chunks that are pending to receipts that are kept: the loop that preparation and annotation have in common."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

from pipelines.preparation.progress import Progress
from pipelines.preparation.receipt_book import PlanKind, ReceiptBook, ReceiptKind
from pipelines.ray_tasks import retried

# Receipts on their way at once. A store answers in tens of milliseconds: one after the other, hundreds of workers would
# be done sooner than their receipts, and a kill would cost them all.
_COMMITTERS = 16
_A_MOMENT_S = 0.01


def work_off(book: ReceiptBook[PlanKind, ReceiptKind], run: Callable[[list[int]], Iterator[ReceiptKind]]) -> None:
    """Do what `book` has pending and commit each receipt as it comes. Prints what comes of it.

    Args:
        book: says what is pending, and keeps what is done.
        run: carries out the chunks of these numbers, in any order.

    Raises:
        PublishError: too many rows are bad already; the rest is not tried.
        what `run` raises: with what was done before kept.
    """
    if book.receipts:
        print(f"resuming: {len(book.receipts)} of {len(book.plan.chunks)} chunks are done", flush=True)
    if book.lost:
        fault = next(iter(book.lost.values()))
        print(f"done anew: {len(book.lost)} of {len(book.plan.chunks)} chunks, such as that of {fault}", flush=True)
    book.check_share()
    if not book.pending:
        return
    progress = Progress(book.plan.num_rows, book.num_done, bad=book.bad, tokens=book.num_tokens)
    try:
        for receipt in _put(book, retried(lambda: run(book.pending))):
            book.enter(receipt)
            book.check_share()
            progress.update(book.num_done, book.num_bad, book.num_tokens)
    finally:
        progress.finish(book.num_done, book.num_bad)


def _put(book: ReceiptBook[PlanKind, ReceiptKind], receipts: Iterator[ReceiptKind]) -> Iterator[ReceiptKind]:
    """`receipts`, in their order, as they lie in the store."""
    with ThreadPoolExecutor(_COMMITTERS) as threads:
        waiting: deque[Future[ReceiptKind]] = deque()
        for receipt in receipts:
            waiting.append(threads.submit(book.put, receipt))
            # A disk is done in this time, so that what is shown is not one chunk behind.
            while waiting and (len(waiting) == _COMMITTERS or wait(list(waiting)[:1], timeout=_A_MOMENT_S).done):
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
