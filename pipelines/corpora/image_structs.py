"""Images as the Hugging Face hub's datasets hold them: structs `{bytes, path}`, of which the bytes count first."""

from __future__ import annotations

from typing import Any

from pipelines.corpora import typed_content
from pipelines.records import RowError


def replace(row: dict[str, Any], own_id: str) -> None:
    """Put bytes, or else a path, for each struct in `image`, `images` and the typed content of `messages` of `row`.

    Raises:
        RowError: image_missing: a struct has neither.
    """
    for field in ("image", "images"):
        held = row.get(field)
        row[field] = [_plain(each, own_id) for each in held] if isinstance(held, list) else _plain(held, own_id)
    for part in typed_content.image_parts(row.get("messages")):
        part["image"] = _plain(part.get("image"), own_id)


def _plain(value: Any, own_id: str) -> Any:
    if not isinstance(value, dict):
        return value
    if value.get("bytes") is not None:
        return value["bytes"]
    if not value.get("path"):
        raise RowError("image_missing", f"the image is a struct ({', '.join(value)}) without bytes and path", own_id)
    return value["path"]
