"""Turns as Parquet has them beside lists of `from` and `value`: structs of lists, and turns of `role` and `content`."""

from __future__ import annotations

from typing import Any

from pipelines.corpora.fields import CONVERSATIONS
from pipelines.records import RowError


def replace(row: dict[str, Any], own_id: str) -> None:
    """Put a list of structs for each struct of lists among the turns of `row`; turns with a `role` become `messages`.

    Raises:
        RowError: row_malformed: the lists are not of one length.
    """
    for field in CONVERSATIONS:
        if isinstance(row.get(field), dict):
            row[field] = _zipped(row[field], field, own_id)
    turns = row.get("conversations")
    if isinstance(turns, list) and turns and all(map(_has_role, turns)):
        row["messages"] = row.pop("conversations")


def _zipped(lists: dict[str, Any], field: str, own_id: str) -> list[dict[str, Any]]:
    """The structs of `lists`, as the library datasets writes a Sequence of them. A list that is null has no part."""
    held = {name: values for name, values in lists.items() if values is not None}
    if not all(isinstance(values, list) for values in held.values()) or len({*map(len, held.values())}) > 1:
        detail = f"'{field}' is a struct of {', '.join(held)}, which are not lists of one length"
        raise RowError("row_malformed", detail, own_id)
    return [dict(zip(held, values, strict=True)) for values in zip(*held.values(), strict=True)]


def _has_role(turn: Any) -> bool:
    return isinstance(turn, dict) and turn.get("from") is None and turn.get("role") is not None
