"""What all readers of files share: rows with their places, text with its lines, columns with distinct names."""

from __future__ import annotations

import codecs
import io
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from ...common.errors import ScaloraError
from .forms import Row


class SourceTable(NamedTuple):
    """Rows as they were read, and the line that each starts on, or the file that each is, where they have such."""

    rows: list[Row]
    lines: list[int]
    names: list[str] = []

    def place(self, source: str, number: int) -> str:
        """Where a row is, by its number from 1."""
        if self.names:
            return f"{source}, {self.names[number - 1]}"
        line = f", line {self.lines[number - 1]}" if self.lines else ""
        return f"{source}{line}, row {number}"


class BadRow(NamedTuple):
    """What is wrong with a row that is malformed, and its line, or its number where rows have no lines."""

    line: int
    error: ScaloraError


_STARTS = {
    b"PAR1": "parquet", b"\x1f\x8b": "gz", b"PK\3\4": "zip or xlsx", b"BZh": "bz2", b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zst", b"\xd0\xcf\x11\xe0": "xls",
}  # fmt: skip
"""How files begin that are no text, and what they are."""
_PAGE = "a web page, and no data; download the file itself"
_IN_PLACE_OF_DATA = {
    b"version https://git-lfs": "a pointer of Git LFS, and no data; get the file with git lfs pull",
    b"<!DOCTYPE html": _PAGE, b"<!doctype html": _PAGE, b"<html": _PAGE,
}  # fmt: skip


def read_text(path: Path) -> str:
    """A file's text as it stands, line ends included; raises ScaloraError with what it is, if not UTF-8."""
    content = path.read_bytes()
    if wide := _wide(content):
        raise ScaloraError(
            f"{path}, line 1: not UTF-8 text but {wide}, as Windows programs write it; save it as UTF-8, or convert it "
            f"with iconv -f {wide} -t UTF-8 {path.name} > new{path.suffix}"
        )
    if other := next((kind for start, kind in _IN_PLACE_OF_DATA.items() if content.startswith(start)), None):
        raise ScaloraError(f"{path}: {other}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if kind := next((kind for start, kind in _STARTS.items() if content.startswith(start)), None):
            raise ScaloraError(f"{path}: not text but a {kind} file; unpack, convert or rename it") from error
        line = content.count(b"\n", 0, error.start) + 1
        raise ScaloraError(
            f"{path}, line {line}: not UTF-8 text ({error.reason}); save it as UTF-8, or convert it: from Western "
            f"Windows programs with iconv -f WINDOWS-1252 -t UTF-8 {path.name} > new{path.suffix}"
        ) from error


def _wide(content: bytes) -> str | None:
    """The encoding of text in 16 or 32 bits: by its mark, or since every second byte of Latin letters is zero."""
    for mark, name in ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF32_BE, "UTF-32")):
        if content.startswith(mark):
            return name
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    start = content[:1000]
    for first, name in ((1, "UTF-16LE"), (0, "UTF-16BE")):
        zeros = start[first::2]
        if len(start) > 3 and zeros.count(0) > 0.8 * len(zeros) and not start[1 - first :: 2].count(0):
            return name
    return None


def read_lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, with their numbers from 1."""
    # Not str.splitlines, which also cuts at the odd separators that web text contains.
    lines = io.StringIO(text, newline=None)
    return ((number, line.removesuffix("\n")) for number, line in enumerate(lines, 1) if line != "\n")


def refuse_row(line: int, message: str, bad: list[BadRow] | None, cause: Exception | None = None) -> None:
    """Add what is wrong with a line's row to those that are bad; raise it as ScaloraError where no row may be."""
    error = ScaloraError(message)
    if bad is None:
        raise error from cause
    bad.append(BadRow(line, error))


def check_distinct(where: str, names: Collection[str]) -> None:
    """Raise ScaloraError where a column has another's name, so that one of them would hide the other."""
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise ScaloraError(f"{where}: columns need distinct names, but {name!r:.60} is there twice; rename one")
        seen.add(name)
