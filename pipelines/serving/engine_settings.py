"""What can be set about one engine: its memory, its queue, and how much work fits between two decode steps."""

from __future__ import annotations

from pydantic import Field

from pipelines.settings import Section

# Characters. What an answer ends with is compared with every beginning of a stop text, at every token, while all others
# wait: with texts of a megabyte, that would take longer than the model.
MAX_STOP_LENGTH = 256


class EngineSettings(Section):
    """Budgets of one engine. They bound memory and delay, never what an answer says."""

    max_slots: int = Field(default=64, gt=0)
    """Most requests that are decoded together; fewer where `kv_cache_bytes` holds fewer."""

    max_length: int | None = Field(default=None, gt=0)
    """Tokens of prompt and answer that one slot holds; as many as the model has positions where not given."""

    kv_cache_bytes: int | None = Field(default=None, gt=0)
    """Memory for keys and values, allocated at the start; where not given, 60 % of what the weights leave of a GPU, or
    4 GiB on a CPU."""

    max_waiting: int = Field(default=128, gt=0)
    """Requests that may wait for a slot; one more is refused at once, over HTTP with 429 where no other engine has room
    either."""

    prefill_tokens: int = Field(default=1024, gt=0)
    """Prompt tokens, padding included, that are read between two decode steps; a longer prompt is read alone."""

    image_batch_size: int = Field(default=8, gt=0)
    """Images that are encoded between two decode steps, together."""

    image_cache_bytes: int = Field(default=512 * 2**20, ge=0)
    """Memory for encoded images that may be asked about again; 0 keeps none."""

    cuda_graphs: bool = True
    """On a GPU, replay decode steps as CUDA graphs; without effect on a CPU."""
