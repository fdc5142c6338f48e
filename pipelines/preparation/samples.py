"""Rows of a corpus -> samples, or the reason why not. Plain Python: nothing here knows of Ray.

A table of samples has one row for every row of its chunk. A row that went wrong keeps its place with a reason, so that
nothing can get lost between here and the shard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from flashsloth import FlashSlothImageProcessor, FlashSlothProcessor
from flashsloth.conversation import ConversationError
from flashsloth.image_processing_flashsloth import WITH_GIF, ImageError, decode_image
from pipelines.preparation.chunks import Chunk, read_chunk
from pipelines.preparation.facts import FACT_COLUMNS, Stopwatch, thumbnail
from pipelines.preparation.image_pins import ImagePins
from pipelines.preparation.plan import Terms
from pipelines.preparation.row_images import ImageFolder, SourceFiles, with_images
from pipelines.preparation.sources import row_key
from pipelines.records import Record, Row, RowError, shortened
from pipelines.shards.images import ImageStore
from pipelines.shards.schema import IGNORED_LABEL, SAMPLE_SCHEMA, image_column

# Beside the sample: which chunk a row belongs to, where a person finds it, for a bad row what is wrong, and what the
# data receipt tells.
WORK_SCHEMA = pa.schema(
    [
        *SAMPLE_SCHEMA,
        ("chunk", pa.int32()),
        *((name, pa.string()) for name in ("location", "reason", "detail")),
        *FACT_COLUMNS,
    ]
)

_EMPTY = dict.fromkeys(WORK_SCHEMA.names)

_Refusal = RowError | ImageError | ConversationError


@dataclass(frozen=True)
class Picture:
    """An image as it was received."""

    data: bytes
    key: str | None
    """A hash of it and of all that decides what is made of it, where rows share images."""
    is_stored: bool
    """Whether a row before, of whatever chunk, has brought it into the store."""


class _Pixels:
    """The pixels of a chunk's images, in memory that is kept: what is new to a process costs more than to fill it."""

    def __init__(self, processor: FlashSlothImageProcessor) -> None:
        self._processor = processor
        self._memory = np.empty((0,), np.uint8)
        self._count = 0

    def begin(self, num_images: int) -> None:
        """Take back what was made, and make room for up to `num_images`."""
        self._count = 0
        if len(self._memory) < num_images:
            side = self._processor.size
            self._memory = np.empty((num_images, self._processor.num_tiles, 3, side, side), np.uint8)

    def make(self, image: Image.Image) -> np.ndarray:
        """uint8[T, 3, H, W] of the next image."""
        self._count += 1
        return self._processor.to_uint8(image, out=self._memory[self._count - 1])


class SampleMaker:
    """Makes the samples of a chunk. Holds what all chunks share; create it once per process.

    Args:
        terms: the plan's terms.
        files: where each source of the plan lies.
        processor: decides ids and pixels.
        example_every: of every so many chunks, one gives a thumbnail to the data receipt.
        store: where rows share their images; None where each row holds its own.
        pins: the plan's, of the images that rows name; None where it has none.
    """

    def __init__(
        self,
        terms: Terms,
        files: Sequence[SourceFiles],
        processor: FlashSlothProcessor,
        example_every: int = 1,
        store: ImageStore | None = None,
        pins: ImagePins | None = None,
    ) -> None:
        self.terms = terms
        self.files = files
        self.processor = processor
        self.example_every = example_every
        self.store = store
        self.pins = pins
        self._image_terms = terms.identity_of_images()
        self._pixels = _Pixels(processor.image_processor)
        self._watch = Stopwatch()
        self._wants_example = False
        self._takes_gif = False
        self._in_chunk: set[str] = set()

    def __call__(self, number: int, chunk: Chunk) -> pa.Table:
        """The rows of `chunk`, the plan's chunk number `number`, as a table with the columns of WORK_SCHEMA.

        Pixels in it are valid until the next chunk is made, into the same memory.

        Raises:
            PlanError: the source's file, or an image, has changed since the plan was made.
        """
        source, files = self.terms.sources[chunk.source], self.files[chunk.source]
        self._watch = Stopwatch()
        self._in_chunk = set()
        self._pixels.begin(chunk.rows)
        self._wants_example = number % self.example_every == 0
        self._takes_gif = source.gif
        with self._watch.time("read"):
            rows = read_chunk(source, files.path, chunk)
        with self._watch.time("tokenize"):
            # Before the first image: between two, the tokenizer would find the CPU's caches full of pixels, which makes
            # it three times as slow.
            texts = [self._tokens(row.content) for row in rows]
        place, root = files.image_root, source.image_root or ""
        images = ImageFolder(place, root, self.pins) if place else None
        fetched = with_images(rows, images, source, self._picture)
        samples = [
            {**_EMPTY, "chunk": number, "key": row_key(source.name, row.position, chunk.repeat)}
            | {"source": source.corpus, "location": row.location}
            | self._sample(row.content, image, tokens)
            | self._watch.take()
            for (row, image), tokens in zip(self._watch.each("read", fetched), texts, strict=True)
        ]
        return _table(samples)

    def _tokens(self, content: Record | RowError) -> dict[str, list[int]] | _Refusal:
        """The columns that come of the text, or why there are none."""
        if isinstance(content, RowError):
            return content
        try:
            tokens = self.processor.encode(
                content.messages, content.image is not None, self.terms.layout, max_length=self.terms.max_length
            )
        except ConversationError as error:
            remedy = _remedy(error, content)
            return RowError(error.reason, f"{error.detail}; {remedy}") if remedy else error
        if all(label == IGNORED_LABEL for label in tokens["labels"]):
            return RowError("no_loss_tokens", "no token of this row is learned: it ends without an answer")
        return tokens

    def _sample(
        self, content: Record | RowError, image: Picture | RowError | None, tokens: dict[str, list[int]] | _Refusal
    ) -> dict[str, Any]:
        if isinstance(content, RowError):
            return _rejected(content, content.id)
        if isinstance(image, RowError):
            return _rejected(image, content.id)
        if isinstance(tokens, Exception):
            return _rejected(tokens, content.id)
        try:
            with self._watch.time("decode"):
                payload = {} if image is None else self._payload(image)
        except ImageError as error:
            return _rejected(error, content.id)
        own = {"id": content.id, "messages": content.messages, "question_types": content.question_types}
        return {**own, **tokens, **payload}

    def _payload(self, picture: Picture) -> dict[str, Any]:
        if picture.is_stored or picture.key in self._in_chunk:
            return {"image_key": picture.key}
        # For payload `original` too: what is stored can be decoded.
        image = decode_image(picture.data, formats=WITH_GIF) if self._takes_gif else decode_image(picture.data)
        facts: dict[str, Any] = {"image_key": picture.key, "image_side": max(image.size)}
        if picture.key:
            self._in_chunk.add(picture.key)
        if self._wants_example:
            self._wants_example = False
            facts["thumbnail"] = thumbnail(image)
        if self.terms.payload == "original":
            return {"image": picture.data, "image_shape": [], "image_dtype": ""} | facts
        # Features begin as pixels: the tower's actor turns them into features.
        pixels = self._pixels.make(image)
        return {
            "image": pixels,
            "image_shape": list(pixels.shape),
            "image_dtype": str(pixels.dtype),
        } | facts

    def _picture(self, row: Row, image: bytes | RowError | None) -> Picture | RowError | None:
        if not isinstance(image, bytes):
            return image
        # Not of the image alone: a run before may have left images here that were made otherwise.
        key = hashlib.sha256(self._image_terms + image).hexdigest() if self.store else None
        # A GIF that another source has brought in is none for a source that takes no GIF.
        may_share = self._takes_gif or not image.startswith(b"GIF8")
        return Picture(image, key, bool(may_share and self.store and key and self.store.has(key)))


def _remedy(error: ConversationError, content: Record) -> str | None:
    """What helps where a whole corpus is likely to have the fault."""
    if content.image is None:
        return None
    if error.reason == "conversation_empty":
        return "an image without text is for jobs/annotate.py, which writes one"
    if error.reason == "empty_question" and len(content.messages) == 2:
        return "a corpus of captions is prepared with layout: caption"
    return None


def _table(samples: list[dict[str, Any]]) -> pa.Table:
    # All images in one buffer would be a copy of each, in memory that is new to the process for every chunk.
    images = image_column([sample.pop("image") for sample in samples])
    table = pa.Table.from_pylist(samples, schema=WORK_SCHEMA)
    return table.set_column(WORK_SCHEMA.get_field_index("image"), WORK_SCHEMA.field("image"), images)


def _rejected(error: _Refusal, own_id: str) -> dict[str, Any]:
    return {"id": shortened(own_id), "reason": error.reason, "detail": shortened(error.detail)}
