"""What all readers of files share: rows with their places, text with its lines, columns with distinct names."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from ...common.errors import ScaloraError
from .forms import Row


class SourceTable(NamedTuple):
    """Rows as they were read, and the line that each starts on if their file has lines."""

    rows: list[Row]
    lines: list[int]

    def place(self, source: str, number: int) -> str:
        """Where a row is, by its number from 1."""
        line = f", line {self.lines[number - 1]}" if self.lines else ""
        return f"{source}{line}, row {number}"


def read_text(path: Path) -> str:
    """A file's text as it stands, line ends included; raises ScaloraError with the line that is not UTF-8."""
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ScaloraError(f"{path}, line {line}: not UTF-8 text ({error.reason}); convert the file") from error


def read_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, with their numbers from 1."""
    # Not str.splitlines, which also cuts at the odd separators that web text contains.
    lines = io.StringIO(text, newline=None)
    return ((number, line.removesuffix("\n")) for number, line in enumerate(lines, 1) if line != "\n")


def check_distinct(where: str, names: Collection[str]) -> None:
    """Raise ScaloraError where a column has another's name, so that one of them would hide the other."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ScaloraError(f"{where}: columns need distinct names, but {name!r:.60} is there twice; rename one")
        seen.add(name)
