"""``scalora methods``: what a recipe can name."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from ..common.quiet import quiet
from .guard import guarded


def methods() -> None:
    """List the methods that a recipe can name, with their options."""
    with guarded():
        quiet()
        from ..methods import all_methods
        from ..methods.peft_any import PEFT_PREFIX, peft_types

        table = Table("method", "what it is", "options (defaults)")
        for name, method in all_methods().items():
            options = ", ".join(f"{key}={field.default!r}" for key, field in method.Options.model_fields.items())
            table.add_row(name, method.summary, options)
        table.add_row(
            f"{PEFT_PREFIX}<TYPE>", f"PEFT's others: {', '.join(peft_types())}", "the fields of PEFT's config"
        )
        Console().print(table)
