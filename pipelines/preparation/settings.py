"""The settings of `jobs/prepare.py`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, AliasChoices, Field, field_validator, model_validator

from pipelines.corpora import FORMATS
from pipelines.settings import JobSettings, Section
from pipelines.shards.manifest import Layout, Payload
from pipelines.storage import is_pattern
from pipelines.worker_pool import PoolSettings

CONFIG_NAME = "config.yaml"
"""The resolved settings, stored beside what they produced."""


# As fsspec does with the paths of corpora: the model's libraries would take ~/model for a name on the hub.
ModelPath = Annotated[str, AfterValidator(os.path.expanduser)]


class SourceSettings(Section):
    """A corpus: one file, or several of one format."""

    path: str = Field(min_length=1)
    """A corpus file: a local path or a URI (s3://bucket/blip_laion_cc_sbu_558k.json, also of gs:// and hf://); with
    * or ? in it, all files that it matches, in the order of their names (hf://datasets/USER/NAME/data/*.parquet)."""
    format: str = "llava"
    """How its rows are written: llava, sharegpt, messages, questions, parquet, webdataset or images; see
    pipelines/corpora."""
    image_root: str | None = None
    """Folder or URI below which the rows' image paths lie; not needed where the corpus holds the images itself."""
    limit: int | None = Field(default=None, gt=0)
    """Take only the first rows, this many, of all its files together."""
    weight: float = Field(default=1.0, gt=0, le=100)
    """How many times a row is taken on average: 0.25 takes about a quarter of the rows, always the same ones (chosen by
    a hash of the key), 2 takes every row twice (stored twice, the second time as KEY+1), 2.25 does both. Of `limit`
    rows, where that is given too."""
    gif: bool = False
    """Take the first frame of a GIF; else its row is quarantined."""
    name: str = ""
    """First part of its rows' keys; default: the file's name without its suffix. Needed where `path` has a * or ?."""

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        if value not in FORMATS:
            raise ValueError(f"no such corpus format; there are: {', '.join(sorted(FORMATS))}")
        return value

    @model_validator(mode="after")
    def _named(self) -> Self:
        if not self.name and is_pattern(self.path):
            raise ValueError(f"{self.path} stands for several files: give the source a name, for its rows' keys")
        if "/" in self.name:
            raise ValueError(f"name is {self.name!r}: what follows a '/' in a row's key is the file within the source")
        if self.format == "images":
            self.image_root = self.image_root or self.path
        self.name = self.name or PurePosixPath(self.path).stem
        if self.name in ("", ".", ".."):  # it is a folder of an annotation's output, too
            raise ValueError(f"{self.path!r} gives the source no name for its rows' keys: give it one")
        return self


def check_listed_once(sources: Sequence[SourceSettings]) -> None:
    """Raise ValueError where two of a job's `sources` have the same path or the same name."""
    for field, remedy in (
        ("path", "list each once: weight says how often its rows are taken"),
        ("name", "rows are keyed by it: give one of them another"),
    ):
        values = [getattr(source, field) for source in sources]
        twice = next((value for value in values if values.count(value) > 1), None)
        if twice is not None:
            raise ValueError(f"two sources have the {field} {twice!r}; {remedy}")


class EncoderSettings(PoolSettings):
    """The frozen vision tower, for payload `features`."""

    path: ModelPath
    """A FlashSloth checkpoint or a SigLIP: a folder or a hub id."""
    batch_size: int = Field(default=32, gt=0)
    """Tiles in one forward pass, to begin with: where the memory does not suffice, a copy halves it for itself."""
    dtype: Literal["float16", "int8"] = "float16"
    """How features are stored: float16, or int8 with a scale per token, half the size and slightly wrong."""


class PrepareSettings(JobSettings):
    """Turn corpora of images and conversations into shards that training reads. Killed and run again, it goes on.

    What was prepared is looked after by `prepare.py verify|inspect|gc FOLDER`; each has a --help of its own.
    """

    sources: list[SourceSettings] = Field(min_length=1)
    """The corpora, in the order of the dataset."""
    output: str = Field(min_length=1)
    """Folder or URI to write the dataset into."""
    processor: ModelPath | None = None
    """Folder with a saved FlashSlothProcessor: a processor alone or a whole checkpoint. This, or `tokenizer`."""
    tokenizer: ModelPath | None = None
    """Phi-2's tokenizer, a folder or microsoft/phi-2: makes the processor of the published model."""
    tiling: Literal["base", "hd"] | None = None
    """With `tokenizer`: one tile of an image (base, the default) or five (hd). A saved processor has its own."""
    layout: Layout = "chat"
    """chat: instruction tuning; caption: alignment, where the question is thrown away."""
    payload: Payload = "pixels"
    """What is stored of an image: original (bytes as received), pixels (uint8, tiled), features (frozen tower)."""
    share_images: bool = False
    """Decode, encode and store an image that several rows name only once. It then is an object of its own, which costs
    a request when it is written and one whenever it is read: worth it where about a third of the rows repeat one."""
    pin_images: bool = True
    """Find out, when the plan is made, in what state every image is that rows name by its path, and end with an error
    where one is read in another. While planning, costs 0.04 ms of a CPU per row, and of an object store a request for
    each folder that rows name, with one more for every further thousand objects in it; 24 bytes an image are kept. Off,
    an image is what it is when it is read, and where an image_root is missing is found out by then."""
    max_length: int | None = Field(default=None, gt=0)
    """Rows of more tokens are quarantined; default: the processor's."""
    chunk_rows: int | None = Field(default=None, gt=0)
    """Rows in a chunk, which is the unit of work, of resuming and of a shard; default: about 50 MB of images, or
    500 rows where images stay encoded. A chunk has fewer where the images that its rows bring in their file would have
    more than 200 MB. Lower it for encoded images of megabytes each that rows name: a worker holds those of a chunk."""
    encoder: EncoderSettings | None = None
    """The tower, for payload `features`."""
    max_quarantined_share: float = Field(default=0.1, ge=0, le=1)
    """With a larger share of bad rows nothing is published."""
    dry_run: bool = Field(default=False, validation_alias=AliasChoices("dry_run", "dry-run"))
    """Print the plan and write nothing."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_listed_once(self.sources)
        bare = next((source.name for source in self.sources if source.format == "images"), None)
        if bare is not None:
            raise ValueError(
                f"source {bare!r}: a folder of images has no conversations to learn from; have them written first "
                "(an annotation), and prepare the corpus that comes of it"
            )
        if (self.processor is None) == (self.tokenizer is None):
            raise ValueError("give exactly one of processor and tokenizer")
        if self.tiling and not self.tokenizer:
            raise ValueError("tiling goes with tokenizer; a saved processor has its own")
        if (self.payload == "features") != (self.encoder is not None):
            raise ValueError(
                f"payload is {self.payload!r} and encoder is {'set' if self.encoder else 'missing'}: "
                "payload 'features' needs an encoder, the others have none"
            )
        return self
