"""Tables by the ending of their file."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from ...common.errors import ScaloraError
from .delimited import read_csv, read_tsv
from .documents import read_txt
from .json_rows import read_json, read_jsonl
from .source import BadRow, SourceTable, check_distinct


def read_parquet(path: Path) -> SourceTable:
    """The rows of a parquet file; raises ScaloraError where it is damaged, or a value cannot be read."""
    import pyarrow
    import pyarrow.parquet

    try:
        # Not read_table, which makes columns of folders called name=value.
        with pyarrow.parquet.ParquetFile(path) as file:
            table = file.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise ScaloraError(f"{path}: not a readable parquet file ({error}); get it again") from error
    check_distinct(str(path), table.column_names)
    unreadable = (ValueError, OverflowError)  # text that is not UTF-8, dates beyond Python's
    try:
        return SourceTable(table.to_pylist(), [])
    except unreadable:
        for number in range(table.num_rows):
            try:
                table.slice(number, 1).to_pylist()
            except unreadable as error:
                raise ScaloraError(f"{path}, row {number + 1}: a value cannot be read ({error}); mend it") from error
        raise


_WHOLE: dict[str, Callable[[Path], SourceTable]] = {".json": read_json, ".parquet": read_parquet, ".txt": read_txt}
_DELIMITED = {".csv": read_csv, ".tsv": read_tsv}
ENDINGS = (".json", ".jsonl", ".parquet", ".txt", *_DELIMITED)
"""Of files that can be read, in lower case; upper case is the same."""


def read_table(path: Path, positions: Collection[str] = (), bad: list[BadRow] | None = None) -> SourceTable:
    """The rows of a file with one of ``ENDINGS``.

    Args:
        path: the file.
        positions: columns "0", "1", … that are asked for. A .csv or .tsv that does not name them has no header.
        bad: takes what is wrong with lines that are no row, in files that have a row a line. None: they are refused.

    Raises:
        ScaloraError: the file is malformed; the message names it and the line on which a row starts.
    """
    ending = path.suffix.lower()
    try:
        if ending in _DELIMITED:
            return _DELIMITED[ending](path, positions, bad)
        return read_jsonl(path, bad) if ending == ".jsonl" else _WHOLE[ending](path)
    except OSError as error:
        raise ScaloraError(f"{path} cannot be read ({error.strerror or error}); give a file that can") from error
