"""What can be set about the service. `jobs/serve.py` and the `args:` of a Serve file fill the same model."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from pipelines.serving.engine_settings import EngineSettings
from pipelines.settings import Section

# As DNS has it, with a last label that no number can have: addresses are never fetched from.
_HOST = re.compile(r"([a-z0-9_-]+\.)*[a-z][a-z0-9-]*(:[1-9][0-9]{0,4})?")


def _bare_host(text: str) -> str:
    """The host in small letters; raises `ValueError` for what no image's address could ever match."""
    host = text.lower()
    if not _HOST.fullmatch(host):
        raise ValueError(f"{text!r} is no host; write its bare name, as cdn.example.com or cdn.example.com:8443")
    return host


TokenHash = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
ImageHost = Annotated[str, AfterValidator(_bare_host)]


class Limits(Section):
    """What one request may ask for, and one client. Everything beyond is refused before the model sees it."""

    max_body_bytes: int = Field(default=20 * 2**20, gt=0)
    """Largest request body; a larger one is answered with 413. No fetched image may be larger either."""

    max_open_body_bytes: int = Field(default=2**30, gt=0)
    """Bytes of bodies, and of images fetched for them, that one ingress holds at once, until they are read; what comes
    beyond is answered with 429."""

    max_image_pixels: int = Field(default=50_000_000, gt=0)
    """Largest image by width x height, read from its header before it is decoded."""

    max_prompt_tokens: int = Field(default=2048, gt=0)
    """Longest prompt, visual tokens included."""

    max_tokens: int = Field(default=1024, gt=0)
    """Longest answer a request may ask for."""

    default_max_tokens: int = Field(default=256, gt=0)
    """Length of an answer where the request does not say; at most `max_tokens`, and what is left of a slot."""

    deadline_s: float = Field(default=100, gt=0)
    """Seconds from a request's arrival at an engine after which its answer ends where it is. To come and to be read, it
    may take as long before that. Keep both together below the `request_timeout_s` of HTTP, which ends a request without
    a word."""

    max_open_requests: int = Field(default=256, gt=0)
    """Requests that one ingress works on at once; one more is answered with 429 before its body is read."""

    requests_per_minute: int | None = Field(default=None, gt=0)
    """Requests of one client that one ingress takes per minute: each ingress counts for itself, so with several of them
    a client gets up to this times `num_ingress_replicas`. A client is a token; where there are none, the address that
    the connection comes from, which behind a proxy is the proxy's."""

    @model_validator(mode="after")
    def _check_bodies(self) -> Limits:
        if self.max_open_body_bytes < self.max_body_bytes:
            raise ValueError(
                f"max_open_body_bytes is {self.max_open_body_bytes}, less than max_body_bytes, {self.max_body_bytes}: "
                "the largest body would always be told to try again"
            )
        return self


class Policy(Section):
    """What the ingress allows. The `user_config` of a Serve file changes it while the service runs."""

    limits: Limits = Limits()
    """What one request may ask for."""

    tokens: dict[str, TokenHash] = Field(default_factory=dict)
    """Name of a client -> sha256 of its token in hex, as `jobs/serve.py token NAME` prints it. Where there are none,
    everybody may ask."""

    image_hosts: list[ImageHost] = Field(default_factory=list)
    """Hosts (`host` or `host:port`) whose images may be named by http(s) address. Where there are none, images come as
    data URIs only."""

    def changed(self, user_config: dict[str, Any]) -> Policy:
        """This policy with what `user_config` says in its place; a field that it leaves out stays as it is.

        Raises:
            ValidationError: it names an unknown field, or a value that makes no sense.
            ValueError: answers could take longer than what was arranged for when the service was deployed.
        """
        limits = user_config.get("limits", {})
        if isinstance(limits, dict):
            limits = {**self.limits.model_dump(), **limits}
        policy = Policy.model_validate({**self.model_dump(), **user_config, "limits": limits})
        longest = self.limits.deadline_s
        if policy.limits.deadline_s > longest:
            raise ValueError(
                f"limits.deadline_s: {policy.limits.deadline_s:g} is more than the {longest:g} of `args`, "
                "by which replicas that are to end wait for answers; raise it there, and request_timeout_s above it"
            )
        return policy


class ServeArgs(Policy):
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
    """Engines, each with a model of its own; the fewest where `max_replicas` is more."""

    max_replicas: int | None = Field(default=None, gt=0)
    """Most engines: another one is started where more requests run and wait than the engines have slots."""

    upscale_delay_s: float = Field(default=30, ge=0)
    """How long that must last."""

    downscale_delay_s: float = Field(default=600, ge=0)
    """How long fewer requests than that must have come before an engine is stopped."""

    num_ingress_replicas: int = Field(default=1, gt=0)
    """Processes that read requests and decode images."""

    num_cpus: float = Field(default=1, ge=0)
    """CPUs that Ray reserves per engine; on a CPU this is also how many threads compute."""

    num_gpus: float = Field(default=0, ge=0)
    """GPUs that Ray reserves per engine."""

    ingress_num_cpus: float = Field(default=0.5, ge=0)
    """CPUs that Ray reserves per ingress."""

    health_check_period_s: float = Field(default=5, gt=0)
    """How often each engine is looked at; after three bad findings it is replaced."""

    health_check_timeout_s: float = Field(default=10, gt=0)
    """An engine that does not answer a look for this long is found bad."""

    wedged_after_s: float = Field(default=60, gt=0)
    """An engine that has requests and made no step for this long is found bad."""

    engine: EngineSettings = EngineSettings()
    """Budgets of each engine: slots, waiting requests, memory."""

    @model_validator(mode="after")
    def _check_replicas(self) -> ServeArgs:
        if self.max_replicas is not None and self.max_replicas < self.num_replicas:
            raise ValueError(f"max_replicas is {self.max_replicas}, less than num_replicas, {self.num_replicas}")
        return self

    @property
    def policy(self) -> Policy:
        """What the ingress allows at its start."""
        return Policy(limits=self.limits, tokens=self.tokens, image_hosts=self.image_hosts)

    @property
    def drain_s(self) -> float:
        """How long a replica that is to end may take over the answers that are under way."""
        return self.limits.deadline_s + 10
