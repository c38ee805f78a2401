"""Texts made of a row's columns."""

from __future__ import annotations

from collections.abc import Iterator
from string import Formatter

from ..common.errors import ScaloraError
from .data.forms import Row
from .data.rows import PlacedRow
from .data.values import flaw, is_missing, shown


class Template:
    """A text with {column} fields, e.g. "Question: {question}\\nAnswer:"; a brace that is none is written twice.

    Args:
        field: the recipe's name of it, for messages.
        text: the template, or with ``is_column`` the name of the one column that it is.

    Raises:
        ScaloraError: a field is no plain column name, or the braces do not match; the message gives its place.
    """

    def __init__(self, field: str, text: str, *, is_column: bool = False) -> None:
        self.field = field
        if flaw(text):
            raise ScaloraError(f"{field}: the template {flaw(text)}; mend it")
        self._parts = [("", text)] if is_column else list(_parse(field, text))
        self.columns = tuple(dict.fromkeys(column for _, column in self._parts if column is not None))

    def __call__(self, row: Row) -> str:
        return "".join(literal if column is None else f"{literal}{row[column]}" for literal, column in self._parts)

    def check(self, row: PlacedRow, *, keep_missing: bool) -> None:
        """Raise ScaloraError where a field is no text or number, or all are missing and they may not be.

        A column that the row lacks is not looked at: a task may fill it in later.
        """
        columns = [column for column in self.columns if column in row]
        for column in columns:
            if reason := flaw(row[column]):
                raise ScaloraError(f"{self.field}: column {column!r} {reason} in {row.place}; mend or drop the row")
        if columns and not keep_missing and all(is_missing(row[column]) for column in columns):
            found = "empty" if not str(row[columns[0]]).strip() else shown(row[columns[0]])
            raise ScaloraError(
                f"{self.field}: column {columns[0]!r} is {found} in {row.place}; fill or drop the row, or set "
                "task.data.missing: keep to take such texts as they stand"
            )


def _parse(field: str, text: str) -> Iterator[tuple[str, str | None]]:
    """Pairs of literal text and the column after it, if any."""
    parts, position = iter(Formatter().parse(text)), 0
    way_out = "write {column} with a column's plain name, and a literal brace twice"
    while True:
        try:
            literal, name, spec, conversion = next(parts)
        except StopIteration:
            return
        except ValueError as error:
            raise ScaloraError(
                f"{field}: {shown(text[position:], 40)} is no template (character {position + 1}: {error}); {way_out}"
            ) from error
        position += len(literal)
        if name is None:
            # Of two braces the parser gives one, at the end of a literal.
            position += text[position : position + 1] in ("{", "}") and literal[-1:] == text[position : position + 1]
            yield literal, None
            continue
        source = "{" + name + (f"!{conversion}" if conversion else "")
        source += (f":{spec}" if spec or text.startswith(source + ":", position) else "") + "}"
        if source != "{" + name + "}" or not name or name.isdecimal() or "." in name or "[" in name:
            raise ScaloraError(f"{field}: {source} is no column (character {position + 1}); {way_out}")
        position += len(source)
        yield literal, name
