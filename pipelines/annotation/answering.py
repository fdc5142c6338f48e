"""Who answers: an engine in this process, or a running service. Plain Python: nothing here knows of Ray.

Both take questions one by one from any thread, hold a bounded number of them, and complete a future for each. So the
questions of several chunks follow each other without a gap, and the engine's batch stays full across their borders.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from flashsloth.conversation import ConversationError
from flashsloth.image_processing_flashsloth import IMAGE_FORMATS, WITH_GIF, ImageError, decode_image
from pipelines.annotation.parts import Answered
from pipelines.device_errors import DeviceError
from pipelines.encode import is_device_failure
from pipelines.serving.engine import Answer, Chunk, Encoder, Engine, Prompt, Ticket
from pipelines.serving.sampling import Sampling

# Questions in hand per slot: those that are decoded, and enough to outlast the beginning of the next chunk. Its first
# rows come late, for its images are prepared by several threads at once, many to each.
AHEAD = 4


@dataclass(frozen=True)
class Question:
    """What one row asks.

    Attributes:
        messages: a conversation that ends with a question.
        image: as received, or None.
        takes_gif: whether the image may be a GIF, of which the first frame is taken.
        sampling: how the answer is drawn.
    """

    messages: Sequence[Mapping[str, str]]
    image: bytes | None
    takes_gif: bool
    sampling: Sampling

    def picture(self) -> Image.Image | None:
        """The image, decoded; raises ImageError."""
        if self.image is None:
            return None
        return decode_image(self.image, formats=WITH_GIF if self.takes_gif else IMAGE_FORMATS)


class Asker(Protocol):
    """What an annotation asks. Every method may be called from any thread."""

    def prepare(self, question: Question) -> Any:
        """What can be done ahead of time: a prompt as `ask` takes it, or, Answered, why there will be no answer."""

    def ask(self, prompt: Any) -> Future[Answered]:
        """Hand in a prompt; waits while as many are in hand as may be. The future fails where the asker does."""

    def close(self) -> None:
        """End whatever is under way."""


class EngineAsker:
    """Asks an engine of this process.

    Args:
        engine: whose batch is to stay full. Its queue must hold `AHEAD` requests a slot.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._encoder = Encoder(engine.processor)
        self._room = threading.Semaphore(AHEAD * engine.stats().slots)

    def prepare(self, question: Question) -> Prompt | Answered:
        """Decode the image, tokenize, lay out."""
        try:
            return self._encoder.prompt(question.messages, question.picture(), question.sampling)
        except (ImageError, ConversationError) as error:
            return Answered.failed(str(error))

    def ask(self, prompt: Prompt) -> Future[Answered]:
        """Submit to the engine."""
        future: Future[Answered] = Future()
        self._room.acquire()
        try:
            ticket = self.engine.submit(prompt)
        except ValueError as error:
            self._room.release()
            future.set_result(Answered.failed(f"too_long: {error}", len(prompt.input_ids)))
            return future
        except BaseException:
            self._room.release()
            raise
        ticket.set_listener(_Listener(ticket, future, self._room))
        return future

    def close(self) -> None:
        """Stop the engine; what it has not answered fails."""
        self.engine.close()


class _Listener:
    """Gathers the chunks of one answer, and completes its future with the last."""

    def __init__(self, ticket: Ticket, future: Future[Answered], room: threading.Semaphore) -> None:
        self._ticket, self._future, self._room = ticket, future, room
        self._chunks: list[Chunk] = []

    def __call__(self, chunk: Chunk) -> None:
        self._chunks.append(chunk)
        if chunk.finish_reason is None:
            return
        self._room.release()
        failure = self._ticket.failure
        num_tokens = len(self._ticket.prompt.input_ids)
        if chunk.finish_reason == "error" and failure is not None and _concerns_all(failure):
            self._future.set_exception(DeviceError(f"the engine failed: {chunk.error}"))
        elif chunk.finish_reason == "error":
            self._future.set_result(Answered.failed(f"engine_error: {chunk.error}", num_tokens))
        else:
            answer = Answer.join(self._chunks)
            self._future.set_result(Answered(answer.text, answer.finish_reason, num_tokens, len(answer.token_ids)))


def _concerns_all(failure: Exception) -> bool:
    """Whether another worker could do better, so that the row is not to blame."""
    return isinstance(failure, RuntimeError) and (is_device_failure(failure) or "engine is closed" in str(failure))
