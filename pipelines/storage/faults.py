"""What goes wrong between here and a store: which answers are asked for again, and errors that name their object.

A request without an answer, or with a throttling one, botocore repeats (`pipelines.storage` says how often). An answer
that breaks off in its body it does not see: those are asked for again here. Both pause longer each time, with jitter.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from aiohttp import ClientError, ClientPayloadError
from botocore.exceptions import BotoCoreError, IncompleteReadError, ResponseStreamingError
from fsspec.exceptions import FSTimeoutError
from huggingface_hub.errors import HTTPError  # of the HTTP library that the hub's client uses, whichever that is

_BODY_TRIES = 5
# FSTimeoutError is what fsspec makes of a body that stalls; a request that does, stays botocore's ReadTimeoutError.
_BROKEN_BODY = (FSTimeoutError, ResponseStreamingError, IncompleteReadError, ClientPayloadError)

# S3's codes, none where only a header was asked for, that say of an object or a bucket that it is closed. What else
# s3fs makes a PermissionError says of the asker that his token has expired, his clock is wrong, his key is unknown:
# then it is no fault of an object that it was not read.
_CLOSED = (None, "403", "AccessDenied", "AllAccessDisabled", "Forbidden", "InvalidObjectState")
_GOOGLES = ("gcsfs", "google")  # packages whose errors are no OSError
_GOOGLES_FORBIDDEN = "Forbidden: "

Answer = TypeVar("Answer")


class StorageError(ValueError):
    """A place cannot do what is asked of it; the message names the object."""


@contextmanager
def naming(uri: str) -> Iterator[None]:
    """Errors of the work inside name `uri`, which those of sockets, full disks and S3 do not.

    Raises:
        FileNotFoundError: there is no such object.
        PermissionError: it may not be read or written.
        OSError: another fault of this machine, such as a full disk.
        StorageError: the store did not do it, after all its retries.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise FileNotFoundError(errno.ENOENT, "No such file", uri) from error
    except OSError as error:
        raise _named(error, uri) from error
    except (BotoCoreError, ClientError, HTTPError) as error:
        raise _no_answer(uri, error) from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] in _GOOGLES:
            raise _no_answer(uri, error) from error
        raise


def whole_body(request: Callable[[], Answer]) -> Answer:
    """What `request` returns, asked again where the answer stalls, breaks off or is shorter than it announced."""
    for attempt in range(1, _BODY_TRIES):
        try:
            return request()
        except _BROKEN_BODY:
            pause(attempt)
    return request()


def pause(attempt: int) -> None:
    """Wait before trying again: a random time, so that workers do not come back together, longer with each attempt."""
    time.sleep(random.uniform(0, min(0.1 * 2**attempt, 5.0)))


def s3_error(error: OSError) -> dict[str, Any]:
    """What S3 answered, with its Code and Message; empty where `error` came of no answer."""
    return _response(error).get("Error", {})


def _named(error: OSError, uri: str) -> Exception:
    answer = s3_error(error)
    reason = answer.get("Message")
    is_closed = isinstance(error, PermissionError) and answer.get("Code") in _CLOSED
    if is_closed or str(error).startswith(_GOOGLES_FORBIDDEN):
        return PermissionError(errno.EACCES, f"Permission denied{f' ({reason})' if reason else ''}", uri)
    if answer and error.errno != errno.ENAMETOOLONG:
        tried = _response(error).get("ResponseMetadata", {}).get("RetryAttempts", 0) + 1
        what = f"{reason} ({answer.get('Code')}, {tried} attempt{'s' if tried > 1 else ''})"
        return StorageError(f"{uri}: the store answers: {what}")
    return _no_answer(uri, error) if error.errno is None else OSError(error.errno, error.strerror, uri)


def _no_answer(uri: str, error: Exception) -> StorageError:
    cause = error.__cause__ if isinstance(error, FSTimeoutError) else error
    return StorageError(f"{uri}: no whole answer from the store: {str(cause) or type(error).__name__}")


def _response(error: OSError) -> dict[str, Any]:
    return getattr(error.__cause__, "response", None) or {}
