"""Numbers of recipes: a truth value is none, and neither is a text."""

from __future__ import annotations

from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticCustomError

NO_NUMBER = "no_number"
"""The type of the error that :func:`numbers_only` raises; its context has the `field`."""


def refuse_no_number(name: str, value: Any, kind: Any) -> None:
    """Raise ValueError where a field of numbers alone (int, float, or None too) is given true, false or a text."""
    if isinstance(value, bool | str) and _is_numeric(kind):
        given = str(value).lower() if isinstance(value, bool) else repr(value)
        reason = "{field} is {given}, which is no number: write one, without quotes"
        raise PydanticCustomError(NO_NUMBER, reason, {"field": name, "given": given[:60]})


def numbers_only(cls: type[BaseModel], given: Any) -> Any:
    """A section's values as given, before pydantic reads them, which takes true for 1 and "8" for 8."""
    for name, value in given.items() if isinstance(given, dict) else ():
        if name in cls.model_fields:
            refuse_no_number(name, value, cls.model_fields[name].annotation)
    return given


def _is_numeric(kind: Any) -> bool:
    kinds = set(get_args(kind)) if get_origin(kind) in (Union, UnionType) else {kind}
    return bool(kinds & {int, float}) and kinds <= {int, float, type(None)}
