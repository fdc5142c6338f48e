"""What the objects of the chat API are made of: which values their fields take, told apart as JSON tells them apart."""

from __future__ import annotations

from itertools import islice
from typing import Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError


class Wire(BaseModel):
    """An object of the API. A field that is not listed is refused by name."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """A field that is null asks for nothing, whatever it is: clients write out all that their library knows of.

        Of those that are unknown and no null, the first is left, to be refused: of a hundred thousand, each would be
        a fault with a place and a message.
        """
        if not isinstance(data, dict):
            return data
        fields = {name: value for name, value in data.items() if name in cls.model_fields}
        unknown = (name for name, value in data.items() if value is not None and name not in cls.model_fields)
        return fields | {name: data[name] for name in islice(unknown, 1)}


def nothing_but(*values: Any) -> AfterValidator:
    """What this service does not do: the field is null, or has one of `values`, which do not ask for it."""

    def check(value: Any) -> None:
        if value is not None and value not in values:
            raise PydanticCustomError("unsupported", "the service cannot do what it asks for")

    return AfterValidator(check)


def json_type(*types: type) -> BeforeValidator:
    """JSON's own `types` alone: pydantic would take true for 1, "5" for 5 and "yes" for true."""

    def check(value: Any) -> Any:
        if value is not None and type(value) not in types:
            expected = "true or false" if types == (bool,) else "a number"
            raise PydanticCustomError("json_type", "{expected} is expected", {"expected": expected})
        return value

    return BeforeValidator(check)


def at_most(limit: int) -> BeforeValidator:
    """No more than `limit` entries, counted before any of them is looked at."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > limit:
            raise PydanticCustomError("too_many", "at most {limit} entries are taken", {"limit": limit})
        return value

    return BeforeValidator(check)


NUMBER = json_type(int, float)
TRUTH = json_type(bool)
