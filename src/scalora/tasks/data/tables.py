"""Tables read from files: JSON, JSON lines, CSV, GLUE's TSV, parquet. What is malformed is named with its line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from ...common.errors import ScaloraError
from .forms import Row


class SourceTable(NamedTuple):
    """Rows as they were read, and the line that each starts on if their file has lines."""

    rows: list[Row]
    lines: list[int]

    def line(self, number: int) -> str:
        return f", line {self.lines[number - 1]}" if self.lines else ""


def _object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ScaloraError(f"{where}: expected an object with named columns, got {type(value).__name__}")
    return value


def read_json(path: Path) -> SourceTable:
    text = path.read_text(encoding="utf-8-sig")
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        hint = "the file seems cut off; get it again" if cut else "mend the file"
        hint = "rename it to .jsonl if it holds one object a line" if error.msg == "Extra data" else hint
        raise ScaloraError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); {hint}") from error
    if not isinstance(rows, list):
        raise ScaloraError(f"{path}: expected a list of objects, got {type(rows).__name__}")
    table = SourceTable(rows, _item_lines(text, len(rows)))
    for number, row in enumerate(rows, 1):
        _object(row, f"{path}{table.line(number)}, row {number}")
    return table


def _item_lines(text: str, count: int) -> list[int]:
    """The line that each item of a JSON list starts on."""
    decoder, lines, line, start, end = json.JSONDecoder(), [], 1, 0, text.find("[") + 1
    for _ in range(count):
        while text[end].isspace() or text[end] == ",":
            end += 1
        line += text.count("\n", start, end)
        lines.append(line)
        start, end = end, decoder.raw_decode(text, end)[1]
    return lines


def read_jsonl(path: Path) -> SourceTable:
    table = SourceTable([], [])
    for number, line in _lines(path):
        try:
            table.rows.append(_object(json.loads(line), f"{path}, line {number}"))
        except json.JSONDecodeError as error:
            raise ScaloraError(f"{path}, line {number}: not valid JSON ({error.msg}); mend or remove it") from error
        table.lines.append(number)
    return table


def _lines(path: Path) -> Iterable[tuple[int, str]]:
    # Split at line feeds only: str.splitlines would also cut at the odd separators that web text contains.
    text = path.read_text(encoding="utf-8-sig")
    return ((number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip())


def read_tsv(path: Path, headerless: bool = False) -> SourceTable:
    """Tab-separated text as GLUE has it: quotes are ordinary characters."""
    return _table(path, _unbroken(list(_lines(path))), headerless)


def _unbroken(lines: list[tuple[int, str]]) -> Iterable[tuple[int, list[str]]]:
    """The fields of every line. Some of QQP's questions go on in the next line: a quote opens them and closes there."""
    rest = iter(lines)
    for number, line in rest:
        cells = line.split("\t")
        width = lines[0][1].count("\t") + 1
        while len(cells) < width and cells[-1][:1] == '"' and cells[-1].count('"') % 2 and (more := next(rest, None)):
            first, *others = more[1].split("\t")
            cells = [*cells[:-1], f"{cells[-1]}\n{first}", *others]
        yield number, cells


def read_csv(path: Path) -> SourceTable:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream)
        return _table(path, ((reader.line_num, cells) for cells in reader if cells), headerless=False)


def _table(path: Path, lines: Iterable[tuple[int, list[str]]], headerless: bool) -> SourceTable:
    names: list[str] = []
    table = SourceTable([], [])
    for number, cells in lines:
        if not names:
            names = [str(i) for i in range(len(cells))] if headerless else cells
            if "" in names or len(set(names)) < len(names):
                raise ScaloraError(
                    f"{path}, line {number}: a header needs distinct names, this has {names}; for a .tsv without a "
                    'header, give positions in task.data.columns, e.g. {text: "3", label: "1"}'
                )
            if not headerless:
                continue
        if len(cells) != len(names):
            raise ScaloraError(
                f"{path}, line {number}: {len(cells)} fields, but the first line has {len(names)}; mend or remove it"
            )
        table.rows.append(dict(zip(names, cells, strict=True)))
        table.lines.append(number)
    return table


def read_parquet(path: Path) -> SourceTable:
    import pyarrow
    import pyarrow.parquet

    try:
        return SourceTable(pyarrow.parquet.read_table(path).to_pylist(), [])
    except pyarrow.ArrowException as error:
        raise ScaloraError(f"{path}: not a readable parquet file ({error})") from error


READERS = {
    ".json": read_json, ".jsonl": read_jsonl, ".csv": read_csv, ".tsv": read_tsv, ".parquet": read_parquet,
}  # fmt: skip
