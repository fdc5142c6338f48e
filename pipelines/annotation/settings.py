"""The settings of `jobs/annotate.py`."""

from __future__ import annotations

import re
import string
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import AliasChoices, Field, field_validator, model_validator

from pipelines.annotation.questions import PROMPT_FIELDS
from pipelines.preparation.settings import SourceSettings, check_listed_once
from pipelines.serving.engine_settings import MAX_STOP_LENGTH, EngineSettings
from pipelines.settings import JobSettings, Section
from pipelines.worker_pool import PoolSettings

PartFormat = Literal["parquet", "jsonl"]


class WorkerSettings(PoolSettings):
    """The pool of workers, each with an engine of its own."""

    num_cpus: float = Field(default=1.0, gt=0)
    """CPUs that one worker reserves; on a cluster without GPUs also how many threads compute."""


class EndpointSettings(Section):
    """A running service that answers in place of own engines. A token comes from OPENAI_API_KEY, never from here."""

    url: str
    """Base of an OpenAI-style API, such as http://127.0.0.1:8000/v1."""
    model: str | None = None
    """Name of the model; the one that the endpoint lists, where it lists one."""
    concurrency: int = Field(default=64, gt=0)
    """Requests under way at once, of one worker."""
    timeout_s: float = Field(default=300, gt=0)
    """After this long a request is tried again."""
    max_retries: int = Field(default=8, ge=0)
    """How often a request is sent again, with growing pauses, when the service is busy or away; where it is busy, as
    long as it answers others of ours."""

    @field_validator("url")
    @classmethod
    def _is_http(cls, value: str) -> str:
        example = "such as http://127.0.0.1:8000/v1"
        if not re.match(r"https?://[^/]", value, re.IGNORECASE):
            raise ValueError(f"it begins with http:// or https:// and a host, {example}")
        try:
            parts = urlsplit(value)
            (parts.hostname or "").encode("idna")
            _ = parts.port
        except ValueError as error:
            raise ValueError(f"{error}; it has a host and, after a colon, a port, {example}") from error
        if not parts.hostname or re.search(r"[\s\x00-\x1f\x7f]", value):
            raise ValueError(f"it has a host and nowhere a space, {example}")
        return value


class AnnotateSettings(JobSettings):
    """Let a checkpoint caption or answer every row of a dataset. Killed and run again, it goes on.

    What was written is checked by `annotate.py verify FOLDER`.
    """

    sources: list[SourceSettings] = Field(min_length=1)
    """The corpora, in the order of the output."""
    output: str = Field(min_length=1)
    """Folder or URI to write the answers into."""
    checkpoint: str | None = None
    """Folder or URI of an exported checkpoint. This, or `endpoint`."""
    endpoint: EndpointSettings | None = None
    """A running service in place of a checkpoint: --endpoint.url http://127.0.0.1:8000/v1."""
    prompt: str | None = None
    """What to ask about every row; {question} stands for the row's own question, {id} for its id. Without a prompt the
    row's conversation is asked up to its last question."""
    format: PartFormat = "parquet"
    """How the answers are written: parquet, or JSON lines."""
    as_corpus: bool = True
    """Also write the conversation and the image, so that the output is a corpus for jobs/prepare.py. An image that the
    input names by its path is named, one that it holds is copied."""
    max_tokens: int = Field(default=128, gt=0)
    """Longest answer."""
    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """0 takes the likeliest token; above it answers are drawn, each row's by a seed of its own."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Draw from the likeliest tokens that hold this much probability."""
    stop: list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH)]] = Field(default_factory=list)
    """Texts before which an answer ends."""
    seed: int = 0
    """Where answers are drawn: another seed, other answers."""
    chunk_rows: int = Field(default=512, gt=0)
    """Rows in a chunk, which is the unit of work, of resuming and of an output file. A chunk has fewer where the images
    that its rows bring in their file would have more than 200 MB."""
    max_error_share: float = Field(default=0.1, ge=0, le=1)
    """With a larger share of rows without an answer nothing is published."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto: a GPU where there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the model; auto: bfloat16 on a GPU, float32 on a CPU."""
    engine: EngineSettings = EngineSettings()
    """Budgets of one worker's engine."""
    workers: WorkerSettings = WorkerSettings()
    """The pool of workers."""
    dry_run: bool = Field(default=False, validation_alias=AliasChoices("dry_run", "dry-run"))
    """Print the plan and write nothing."""

    @field_validator("prompt")
    @classmethod
    def _known_fields(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            parts = list(string.Formatter().parse(value))
        except ValueError as error:
            raise ValueError(f"{error}; a brace that is meant as one is written twice") from error
        for _, field, layout, conversion in parts:
            if field is not None:
                _check_field(field, layout or "", conversion)
        if not value.strip():
            raise ValueError("it is empty")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_listed_once(self.sources)
        if (self.checkpoint is None) == (self.endpoint is None):
            raise ValueError("give exactly one of checkpoint and endpoint")
        if self.prompt is None and any(source.format == "images" for source in self.sources):
            raise ValueError("a folder of images has no questions: give a prompt")
        return self


def _check_field(field: str, layout: str, conversion: str | None) -> None:
    """Raise ValueError for a field of a prompt that there is not, or that cannot be written for every row."""
    known = " and ".join(f"{{{name}}}" for name in PROMPT_FIELDS)
    if field not in PROMPT_FIELDS:
        raise ValueError(f"there is no field {{{field}}}; there are {known}")
    written = f"{{{field}{f'!{conversion}' if conversion else ''}{f':{layout}' if layout else ''}}}"
    if "{" in layout:
        raise ValueError(f"{written} is laid out by another field; write {{{field}}}")
    try:
        written.format(**dict.fromkeys(PROMPT_FIELDS, ""))
    except ValueError as error:
        raise ValueError(f"{written} cannot be written: {error}; {known} are texts: write {{{field}}}") from error
