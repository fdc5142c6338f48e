"""One chunk: its rows are asked, its part is put if absent, and a receipt says so. Plain Python: nothing knows of Ray.

Several threads of a process may each have a chunk. They hand in their questions one chunk after the other, so while
the last answers of a chunk are still being decoded, the first questions of the next one take the slots that fall free.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from pipelines import storage
from pipelines.annotation.answering import Asker, Question
from pipelines.annotation.ledger import PartReceipt
from pipelines.annotation.parts import Answered, PartRow, describe, part_name, serialize
from pipelines.annotation.plan import AnnotationPlan, AnnotationTerms
from pipelines.annotation.questions import ask, row_seed
from pipelines.preparation.chunks import Chunk, read_chunk
from pipelines.preparation.row_images import ImageFolder, SourceFiles, with_images
from pipelines.preparation.sources import SourceTerms, row_key
from pipelines.records import FileFormatError, Message, Row, RowError
from pipelines.serving.sampling import Sampling
from pipelines.shards.receipts import account


class ChunkAnnotator:
    """Carries out chunks of a plan. Holds what all chunks share; create it once per process.

    Args:
        plan_identity: of the plan.
        terms: the plan's.
        files: where this process finds each source.
        output: where the parts go.
        asker: who answers.
    """

    def __init__(
        self,
        plan_identity: str,
        terms: AnnotationTerms,
        files: Sequence[SourceFiles],
        output: str,
        asker: Asker,
    ) -> None:
        self.plan_identity = plan_identity
        self.terms = terms
        self.files = files
        self.output = output
        self.asker = asker
        self._asking = threading.Lock()

    def __call__(self, number: int, chunk: Chunk, attempt: int = 0) -> PartReceipt:
        """Write the part of `chunk`, number `number` of the plan, as its `attempt` unless that is there.

        Raises:
            PlanError: the source's file has changed since the plan was made.
            FileFormatError: a part without a receipt is there, and damaged.
            AccountingError: the part does not hold exactly the chunk's rows.
            DeviceError, EndpointError: who should answer has failed.
        """
        source = self.terms.sources[chunk.source]
        name = part_name(source.corpus, number, self.terms.format, attempt)
        uri = storage.join(self.output, name)
        try:
            data = storage.read_bytes(uri)  # of a run that was killed before its driver could write the receipt
        except FileNotFoundError:
            data = serialize(self._rows(source, chunk), self.terms.model, self.terms.format, self.terms.as_corpus)
            if not storage.put_if_absent(uri, data):
                data = storage.read_bytes(uri)  # another driver's worker was faster
        try:
            entry, keys = describe(name, data)
        except FileFormatError as error:
            raise FileFormatError(f"{self.output}: {error}; remove it and run the job again") from error
        plan = AnnotationPlan(terms=self.terms, chunks=[chunk])
        account(plan.keys(chunk), keys, [])
        return PartReceipt(plan=self.plan_identity, chunk=number, planned=chunk.rows, part=entry)

    def _rows(self, source: SourceTerms, chunk: Chunk) -> list[PartRow]:
        with self._asking:
            asked = list(self._asked(source, chunk))
        return [self._part_row(source, row, key, messages, answer.result()) for row, key, messages, answer in asked]

    def _asked(self, source: SourceTerms, chunk: Chunk) -> Iterator[tuple[Row, str, list[Message], Future[Answered]]]:
        """Each row with what was asked, and the answer to come."""
        files = self.files[chunk.source]
        rows = read_chunk(source, files.path, chunk)

        def make(row: Row, image: bytes | RowError | None) -> tuple[list[Message], Any]:
            return self._prompt(source, row_key(source.name, row.position, chunk.repeat), row, image)

        images = ImageFolder(files.image_root) if files.image_root else None
        for row, (messages, prompt) in with_images(rows, images, source, make):
            key = row_key(source.name, row.position, chunk.repeat)
            if isinstance(prompt, Answered):
                answer: Future[Answered] = Future()
                answer.set_result(prompt)
            else:
                answer = self.asker.ask(prompt)
            yield row, key, messages, answer

    def _prompt(
        self, source: SourceTerms, key: str, row: Row, image: bytes | RowError | None
    ) -> tuple[list[Message], Any]:
        """What is asked about a row, and the prompt for it, or Answered where there is none. Runs in many threads."""
        if isinstance(row.content, RowError):
            return [], Answered.failed(str(row.content))
        messages: list[Message] = []
        try:
            messages = ask(row.content, self.terms.prompt)
            if isinstance(image, RowError):
                raise image
        except RowError as error:
            return messages, Answered.failed(str(error))
        terms = self.terms
        sampling = Sampling(
            max_tokens=terms.max_tokens,
            temperature=terms.temperature,
            top_p=terms.top_p,
            stop=tuple(terms.stop),
            seed=row_seed(terms.seed, key),
        )
        turns = [{"role": message["role"], "content": message["content"]} for message in messages]
        return messages, self.asker.prepare(Question(turns, image, source.gif, sampling))

    def _part_row(
        self, source: SourceTerms, row: Row, key: str, messages: list[Message], answered: Answered
    ) -> PartRow:
        own_id = row.content.id
        image = None if isinstance(row.content, RowError) else row.content.image
        if answered.error is not None and isinstance(image, bytes):
            image = None  # nothing can be learned from the row, and the image may be what is wrong with it
        return PartRow(key, own_id, source.corpus, messages, image, answered)
