"""What can be set about the service. `jobs/serve.py` and the `args:` of a Serve file fill the same model."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipelines.settings import Section


class Limits(Section):
    """What one request may ask for. Everything beyond is refused before the model sees it."""

    max_body_bytes: int = Field(default=20 * 2**20, gt=0)
    """Largest request body; a larger one is answered with 413."""

    max_image_pixels: int = Field(default=50_000_000, gt=0)
    """Largest image by width x height, read from its header before it is decoded."""

    max_prompt_tokens: int = Field(default=2048, gt=0)
    """Longest prompt, visual tokens included."""

    max_tokens: int = Field(default=1024, gt=0)
    """Longest answer a request may ask for."""

    default_max_tokens: int = Field(default=256, gt=0)
    """Length of an answer where the request does not say; at most `max_tokens`."""


class ServeArgs(Section):
    """The service: which checkpoint, on what, how many requests at once."""

    checkpoint: str
    """Folder or URI of an exported checkpoint (config.json, safetensors, processor files)."""

    model_name: str | None = None
    """Name under which clients ask for the model; the last part of `checkpoint` where not given."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model runs; auto: a GPU where there is one."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Arithmetic of the model; auto: bfloat16 on a GPU, float32 on a CPU."""

    num_replicas: int = Field(default=1, gt=0)
    """Engines, each with a model of its own."""

    num_cpus: float = Field(default=1, ge=0)
    """CPUs that Ray reserves per engine; on a CPU this is also how many threads compute."""

    num_gpus: float = Field(default=0, ge=0)
    """GPUs that Ray reserves per engine."""

    max_batch_size: int = Field(default=8, gt=0)
    """Most requests that are decoded together."""

    batch_wait_timeout_s: float = Field(default=0.01, ge=0)
    """How long the first request of a batch waits for others."""

    max_queued_requests: int = Field(default=128, gt=0)
    """Requests that may wait at the door; more are answered with 429."""

    limits: Limits = Limits()
    """What one request may ask for."""
