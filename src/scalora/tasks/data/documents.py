"""Documents: files of plain text, each whole in the column `text`, with its name in `file`."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from glob import glob
from pathlib import Path

from ...common.errors import ScaloraError
from .source import SourceTable, read_text

STDLIB = "python-stdlib"
# Tests, what others have installed, and tables that programs wrote.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}


def read_txt(path: Path) -> SourceTable:
    """The one document that a file is; raises ScaloraError where it is not UTF-8."""
    return _documents(path.parent, [path])


def read_folder(folder: Path) -> SourceTable:
    """All files below a folder, by their names."""
    return _documents(folder, (path for path in folder.rglob("*") if path.is_file()))


def read_matching(pattern: Path, field: str) -> SourceTable:
    """The files that match a pattern with `*`, where `**` stands for any folders, by their names.

    Raises:
        ScaloraError: no file matches, which names the `field`; or one is not UTF-8.
    """
    found = [Path(name) for name in glob(str(pattern), recursive=True)]
    files = [path for path in found if path.is_file()]
    if not files:
        raise ScaloraError(f"{field}: no file matches {pattern}; check the pattern, where ** stands for any folders")
    start = next(parent for parent in pattern.parents if "*" not in str(parent))
    return _documents(start, files)


def stdlib_documents() -> SourceTable:
    """The sources of the running interpreter's standard library, but for tests and generated tables.

    Another version of Python has other sources.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = (path for path in folder.rglob("*.py") if not path.name.startswith("_sysconfigdata"))
    return _documents(folder, (path for path in files if _LEFT_OUT.isdisjoint(path.relative_to(folder).parts)))


def _documents(folder: Path, files: Iterable[Path]) -> SourceTable:
    """Empty files are no documents."""
    table = SourceTable([], [], [])
    for path in sorted(files):
        if (text := read_text(path)).strip():
            name = path.relative_to(folder).as_posix()
            table.rows.append({"text": text, "file": name})
            table.names.append(name)
    return table
