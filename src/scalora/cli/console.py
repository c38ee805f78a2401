"""The terminal of all verbs. Texts of data and paths are shown as they are: brackets and colons have no meaning."""

from __future__ import annotations

from typing import Any

from rich.console import Console


def plain_console(**options: Any) -> Console:
    """rich's console that reads no markup: "[/INST]" in a row would be an error, and "[b]" in a path would vanish."""
    return Console(markup=False, emoji=False, **options)
