"""What clients receive: answers in the shapes of the OpenAI chat API, whole or as a stream of server-sent events."""

from __future__ import annotations

import json
import time
from typing import Any

from pipelines.serving.errors import ApiError
from pipelines.serving.replies import Reply

DONE = b"data: [DONE]\n\n"


def fingerprint(model_hash: str) -> str:
    """What tells clients that another model answers: a beginning of its hash, in the field that OpenAI has for it."""
    return f"fp_{model_hash[:16]}"


class Completion:
    """One answer on its way out.

    Args:
        request_id: becomes a part of the answer's own id.
        model_name: as the client knows it.
        model_hash: of the checkpoint.
        num_prompt_tokens: visual tokens included.
        include_usage: let a stream end with its usage, which is null in all chunks before.
    """

    def __init__(
        self, request_id: str, model_name: str, model_hash: str, num_prompt_tokens: int, include_usage: bool
    ) -> None:
        self._common = {"id": f"chatcmpl-{request_id}", "created": int(time.time()), "model": model_name}
        self._common["system_fingerprint"] = fingerprint(model_hash)
        self._num_prompt_tokens = num_prompt_tokens
        self._include_usage = include_usage

    def whole(self, reply: Reply) -> dict[str, Any]:
        """The body for an answer that comes in one piece."""
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": reply.text},
            "finish_reason": reply.api_finish_reason,
            "logprobs": None,
        }
        usage = self._usage(reply.num_tokens)
        return {**self._common, "object": "chat.completion", "choices": [choice], "usage": usage}

    def opening(self) -> bytes:
        """The first event of a stream: who speaks."""
        return self._event({"role": "assistant", "content": ""})

    def piece(self, reply: Reply) -> bytes:
        """The events for the next piece of an answer."""
        events = self._event({"content": reply.text}) if reply.text else b""
        return events if reply.finish_reason is None else events + self._event({}, reply.api_finish_reason)

    def closing(self, num_tokens: int) -> bytes:
        """The last events of a stream."""
        usage = {"choices": [], "usage": self._usage(num_tokens)}
        return (self._encode(usage) if self._include_usage else b"") + DONE

    def broken(self, error: ApiError) -> bytes:
        """The last event of a stream that cannot go on; its status was sent long ago."""
        return b"data: " + json.dumps(error.body()).encode() + b"\n\n"

    def _event(self, delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return self._encode({"choices": [choice], **({"usage": None} if self._include_usage else {})})

    def _encode(self, content: dict[str, Any]) -> bytes:
        chunk = {**self._common, "object": "chat.completion.chunk", **content}
        return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"

    def _usage(self, given: int) -> dict[str, int]:
        spent = self._num_prompt_tokens
        return {"prompt_tokens": spent, "completion_tokens": given, "total_tokens": spent + given}
