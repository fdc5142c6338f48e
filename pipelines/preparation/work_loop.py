"""From chunks that are pending to receipts that are kept: the loop that preparation and annotation have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from pipelines.preparation.progress import Progress
from pipelines.preparation.receipt_book import PlanKind, ReceiptBook, ReceiptKind
from pipelines.ray_tasks import retried


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
    book.check_share()
    if not book.pending:
        return
    progress = Progress(book.plan.num_rows, book.num_done, bad=book.bad, tokens=book.num_tokens)
    try:
        for receipt in retried(lambda: run(book.pending)):
            book.commit(receipt)
            book.check_share()
            progress.update(book.num_done, book.num_bad, book.num_tokens)
    finally:
        progress.finish(book.num_done, book.num_bad)
