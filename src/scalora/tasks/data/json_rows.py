"""Rows from JSON: a list of objects, or an object a line. What cannot be read is named with its line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from ...common.errors import ScaloraError
from .forms import Row
from .source import BadRow, SourceTable, check_distinct, read_lines, read_text, refuse_row

_A_LIST = "; rename it to .json if it holds one list of objects"


def read_jsonl(path: Path, bad: list[BadRow] | None = None) -> SourceTable:
    """The objects of a file that has one a line.

    Raises:
        ScaloraError: a line holds none, which is named; with `bad` it is added there instead.
    """
    table = SourceTable([], [])
    for number, line in read_lines(read_text(path)):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value, end = _value(line, len(line) - len(line.lstrip()), where)
            if line[end:].strip():
                raise json.JSONDecodeError("Extra data", line, end)
        except json.JSONDecodeError as error:
            hint = _A_LIST if number == 1 and line.lstrip().startswith("[") else ""
            message = f"{where}: not valid JSON ({error.msg}); mend or remove it{hint}"
            refuse_row(number, message, None if hint else bad, error)
            continue
        except ScaloraError as error:
            refuse_row(number, str(error), bad, error)
            continue
        if isinstance(value, dict):
            table.rows.append(value)
            table.lines.append(number)
        elif isinstance(value, list) and number == 1:
            raise ScaloraError(f"{where}: expected an object with named columns, got list{_A_LIST}")
        else:
            refuse_row(number, _no_object(value, where), bad)
    return table


def read_json(path: Path) -> SourceTable:
    """The objects of a list; raises ScaloraError with the line and number of a row that cannot be read."""
    text = read_text(path)
    table = SourceTable([], [])
    try:
        _fill(table, path, text)
    except json.JSONDecodeError as error:
        cut = error.pos >= len(text.rstrip()) or error.msg.startswith("Unterminated")
        hint = "the file seems cut off; get it again" if cut else "mend the file"
        hint = "rename it to .jsonl if it holds one object a line" if error.msg == "Extra data" else hint
        raise ScaloraError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}); {hint}") from error
    return table


def _fill(table: SourceTable, path: Path, text: str) -> None:
    # Item by item, so that each has its line; the whole file at once would give up without one.
    position, counted, line = _after_space(text, 0), 0, 1
    if text[position : position + 1] != "[":
        value, end = _value(text, position, f"{path}, line 1")
        if text[end:].strip():
            raise json.JSONDecodeError("Extra data", text, _after_space(text, end))
        raise ScaloraError(f"{path}: expected a list of objects, got {type(value).__name__}")
    position = _after_space(text, position + 1)
    if text[position : position + 1] != "]":
        while True:
            line, counted = line + text.count("\n", counted, position), position
            where = f"{path}, line {line}, row {len(table.rows) + 1}"
            value, position = _value(text, position, where)
            if not isinstance(value, dict):
                raise ScaloraError(_no_object(value, where))
            table.rows.append(value)
            table.lines.append(line)
            position = _after_space(text, position)
            if text[position : position + 1] != ",":
                break
            position = _after_space(text, position + 1)
    if text[position : position + 1] != "]":
        raise json.JSONDecodeError("Expecting ',' delimiter", text, position)
    if text[position + 1 :].strip():
        raise json.JSONDecodeError("Extra data", text, _after_space(text, position + 1))


def _after_space(text: str, position: int) -> int:
    found = re.compile(r"[ \t\n\r]*").match(text, position)
    return found.end() if found else position


def _value(text: str, position: int, where: str) -> tuple[Any, int]:
    """One value and where it ends; raises JSONDecodeError, or ScaloraError for JSON that cannot be held."""

    def distinct(pairs: list[tuple[str, Any]]) -> Row:
        check_distinct(where, [name for name, _ in pairs])
        return dict(pairs)

    try:
        return json.JSONDecoder(object_pairs_hook=distinct).raw_decode(text, position)
    except (json.JSONDecodeError, ScaloraError):
        raise
    except RecursionError as error:
        raise ScaloraError(f"{where}: lists or objects lie too deep in each other; flatten them") from error
    except ValueError as error:  # Python's limit on the digits of a number
        raise ScaloraError(f"{where}: a number has too many digits; write it as a text") from error


def _no_object(value: Any, where: str) -> str:
    return f"{where}: expected an object with named columns, got {type(value).__name__}"
