"""What clients get where they get no answer."""

from __future__ import annotations

from typing import Any

_SHOWN = 100  # characters at the beginning, and as many at the end, of what a client is told of what it sent


class ApiError(Exception):
    """An answer that is an error, in OpenAI's shape.

    Attributes:
        status: HTTP status.
        message: what is wrong and what would be right.
        param: the field that is to blame, where one is.
        code: stable, meant for programs.
        retry_after_s: when it makes sense to try again, where it does.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after_s: int | None = None
    ) -> None:
        if retry_after_s is None and status in (429, 503):
            retry_after_s = 1
        super().__init__(status, message, code, param, retry_after_s)  # all in args: it crosses processes by pickle
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after_s = retry_after_s

    def body(self) -> dict[str, Any]:
        """The JSON that clients of the OpenAI API expect."""
        return {"error": {"message": self.message, "type": self._type(), "param": self.param, "code": self.code}}

    def headers(self) -> dict[str, str]:
        """HTTP headers that go with it."""
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(self.retry_after_s)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return headers

    def _type(self) -> str:
        if self.status == 429:
            return "rate_limit_error"
        if self.status == 401:
            return "authentication_error"
        return "server_error" if self.status >= 500 else "invalid_request_error"


def shown(text: str) -> str:
    """`text`, without its middle where it is long: an answer must not grow with what a client sent."""
    return text if len(text) <= 2 * _SHOWN else f"{text[:_SHOWN]}...{text[-_SHOWN:]}"


def unknown_model(asked: str, served: str) -> ApiError:
    """The error for a model that is not the one that is served."""
    return ApiError(404, f"the model {shown(asked)!r} is not served here; {served!r} is", "model_not_found", "model")
