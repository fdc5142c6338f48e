"""Models that one run stores as JSON and a later one reads. What lies there damaged is named, with what helps."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel, ValidationError

from pipelines import storage

Model = TypeVar("Model", bound=BaseModel)


class StoredModelError(ValueError):
    """A file is not the model that should lie there; the message names it, the first fault and what helps."""


def load_model(kind: type[Model], uri: str, what: str, remedy: str) -> Model:
    """The model at `uri`.

    Raises:
        StoredModelError: as `parse_model`.
        OSError, StorageError: as `storage.read_bytes`.
    """
    return parse_model(kind, uri, storage.read_bytes(uri), what, remedy)


def parse_model(kind: type[Model], uri: str, data: bytes, what: str, remedy: str) -> Model:
    """The model that `data` spells, which was read at `uri`.

    Args:
        kind: the model.
        uri: where it lies, for the error.
        data: its JSON.
        what: what it is in words, with its article.
        remedy: what helps where it is damaged.

    Raises:
        StoredModelError: it is cut off, no JSON, or another model.
    """
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        fault = f"{field}: {first['msg']}" if field else first["msg"]
        raise StoredModelError(f"{uri}: not {what}: {fault}; {remedy}") from error
