"""``scalora methods``: what a recipe can name."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from ..common.quiet import quiet
from .console import plain_console
from .guard import guarded

LONG = 6  # options that are not told twice


def methods() -> None:
    """List the methods that a recipe can name, with their options."""
    with guarded():
        quiet()
        from ..methods import Family, all_methods
        from ..methods.peft_any import PEFT_PREFIX, peft_types

        table = Table("method", "what it is", "options (defaults)")
        told: dict[tuple[str, ...], tuple[str, dict[str, Any]]] = {}  # who has these options
        for family in Family:
            table.add_section()
            table.add_row("", Text(family.value, style="bold"), "")
            for name, method in all_methods().items():
                if method.family is family:
                    options = {key: field.default for key, field in method.Options.model_fields.items()}
                    first, defaults = told.setdefault(tuple(options), (name, options))
                    if first == name or len(options) < LONG:
                        text = _text(options)
                    else:
                        other = {key: value for key, value in options.items() if value != defaults[key]}
                        text = f"as {first}, but {_text(other)}"
                    table.add_row(name, method.summary, text)
            if family is Family.PEFT:
                others = f"PEFT's others, by <TYPE>: {', '.join(peft_types())}"
                table.add_row(f"{PEFT_PREFIX}<TYPE>", others, "the fields of PEFT's config")
        plain_console().print(table)


def _text(options: dict[str, Any]) -> str:
    """As a recipe writes them."""
    return ", ".join(f"{key}: {_value(value)}" for key, value in options.items())


def _value(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)
