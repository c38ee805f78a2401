"""Tables of cells between commas or tabs. A row is named by the line that it starts on."""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...common.errors import ScaloraError
from .source import BadRow, SourceTable, check_distinct, read_lines, read_text, refuse_row

Cells = tuple[int, list[str]]
"""A row, after the line that it starts on."""
_SEPARATORS = {"\t": ("tabs", "name it .tsv"), "|": ("|", "separate its cells by commas")} | dict.fromkeys(
    ",;", ("commas or semicolons", "name it .csv")
)


def read_csv(path: Path, positions: Collection[str] = (), bad: list[BadRow] | None = None) -> SourceTable:
    """Comma-separated text, or separated by semicolons as Excel writes it, or as a first line `sep=;` says."""
    text, declared = _declared(read_text(path))
    head = re.sub(r'"[^"]*"', "", next((line for _, line in read_lines(text)), ""))
    delimiter = declared or (";" if ";" in head and "," not in head else ",")
    return _table(path, _quoted(path, text, delimiter), positions, bad)


def read_tsv(path: Path, positions: Collection[str] = (), bad: list[BadRow] | None = None) -> SourceTable:
    """Tab-separated text. Quotes enclose cells, as in a .csv, unless some of the file's cannot, as in GLUE's.

    Then no quote has a meaning; but a row that is too short and has one open goes on in the next line.
    """
    text, declared = _declared(read_text(path))
    if declared not in (None, "\t"):
        raise ScaloraError(f"{path}, line 1: it says that cells are separated by {declared!r}: name the file .csv")
    # Without the cells that are enclosed as they should be: between their quotes, tabs and line ends are text.
    opening = _opening(r"\t")
    rest = re.sub(rf'{opening}"[^"]*(?:""[^"]*)*"[^\S\t\r\n]*(?=[\t\r\n]|$)', "", text)
    never_closed = rest.count('"') == 1 and re.search(rf'{opening}"', rest)
    if '"' in rest and not never_closed:
        return _table(path, _plain(list(read_lines(text))), positions, bad)
    return _table(path, _quoted(path, text, "\t"), positions, bad)


def _declared(text: str) -> tuple[str, str | None]:
    """The text with a first line such as `sep=;` empty, by which Excel is told the separator; and the latter."""
    found = re.match(r'("?)sep=([^\r\n"])\1(?=\r|\n|$)', text, re.IGNORECASE)
    return (text[found.end() :], found[2]) if found else (text, None)


def seems_separated(cells: Sequence[str]) -> str:
    """What to say where a first line of one cell holds other separators; nothing where it does not."""
    counts = {each: cells[0].count(each) for each in _SEPARATORS} if len(cells) == 1 else {}
    if not any(counts.values()):
        return ""
    separators, way_out = _SEPARATORS[max(counts, key=lambda each: counts[each])]
    return f"; the file seems to be separated by {separators}: {way_out}"


def _opening(delimiter: str) -> str:
    """The beginning of a cell, as a pattern: white space before its quote is no part of it."""
    return rf"(?:^|(?<=[{delimiter}\r\n]))[^\S{delimiter}\r\n]*"


@contextmanager
def _cells_of_any_size() -> Iterator[None]:
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv.field_size_limit(limit)


def _quoted(path: Path, text: str, delimiter: str) -> Iterator[Cells]:
    # csv takes white space before a quote for a cell that none encloses, and refuses it behind one.
    text = re.sub(rf'{_opening(delimiter)}("[^"]*(?:""[^"]*)*"?)[^\S{delimiter}\r\n]*', r"\1", text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    first: list[str] = []
    with _cells_of_any_size():
        while True:
            start = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                reason = "a quote is never closed" if "end of data" in str(error) else str(error).replace("\t", "\\t")
                raise ScaloraError(
                    f"{path}, line {start}: {reason} in the row that starts here; a quote opens and closes a cell, "
                    f"and is written twice within one{seems_separated(first)}"
                ) from error
            first = first or cells
            if cells:
                yield start, cells


def _plain(lines: list[tuple[int, str]]) -> Iterator[Cells]:
    """The fields of every line. Some of QQP's questions go on in the next line: a quote opens them and closes there."""
    rest = iter(lines)
    width = lines[0][1].count("\t") + 1
    for number, line in rest:
        cells = line.split("\t")
        while len(cells) < width and cells[-1][:1] == '"' and cells[-1].count('"') % 2 and (more := next(rest, None)):
            first, *others = more[1].split("\t")
            cells = [*cells[:-1], f"{cells[-1]}\n{first}", *others]
        yield number, cells


def _table(path: Path, lines: Iterable[Cells], positions: Collection[str], bad: list[BadRow] | None) -> SourceTable:
    """Rows under the names of the first line, or under their positions where `positions` are asked for, not named.

    A row of another width is added to `bad`, or refused where that is None.
    """
    names: list[str] = []
    first: list[str] = []
    table = SourceTable([], [])
    for number, cells in lines:
        if not names:
            first = cells
            headerless = bool(positions) and not set(positions) <= set(cells)
            names = [str(i) for i in range(len(cells))] if headerless else cells
            check_distinct(f"{path}, line {number}", [name for name in names if name.strip()])
            if not headerless:
                continue
        if cells == names and cells == first:
            raise ScaloraError(f"{path}, line {number}: the first line with the names is there again; remove it")
        if len(cells) != len(names):
            message = f"{path}, line {number}: {len(cells)} fields, but the first line has {len(names)}"
            refuse_row(number, f"{message}; mend or remove it{seems_separated(first)}", bad)
            continue
        # A column without a name, as that of pandas' index, cannot be asked for.
        table.rows.append({name: cell for name, cell in zip(names, cells, strict=True) if name.strip()})
        table.lines.append(number)
    return table
