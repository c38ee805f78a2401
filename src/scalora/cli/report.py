"""``scalora report``: the page of a comparison, or the tables of an experiment, written again from results.json."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console

from ..common.disk_layout import REPORT, RESULTS, TABLES
from ..common.errors import ScaloraError
from ..common.quiet import quiet
from .console import plain_console
from .guard import alone, guarded, require

if TYPE_CHECKING:
    from ..arena.results import ComparisonRecord


def report(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="What compare or reproduce wrote: its results.json.")],
    output: Annotated[
        Optional[str],  # noqa: UP045  (typer reads it at run time)
        typer.Option(metavar="FILE", help="The page to write; report.html (tables.md of an experiment) by default."),
    ] = None,
) -> None:
    """Write a comparison's page again from results.json, and show its table; nothing is run.

    In the folder of a paper's experiment it writes the tables.
    """
    with guarded():
        alone("report")
        quiet()
        require("report", "optuna", "scipy")
        from scalora_papers.run import read_experiment, write_tables

        from ..arena.report import write_report
        from ..arena.results import decode_comparison, read_results
        from ..common.files import check_writable

        console, place = plain_console(), Path(folder)
        content = read_results(place)
        experiment = "experiment" in content
        path = Path(output) if output else place / (TABLES if experiment else REPORT)
        if path.is_dir():
            raise ScaloraError(f"--output {path} is a folder: name the file to write, e.g. {path / REPORT}")
        check_writable(path.parent, "--output" if output else "FOLDER")
        path.parent.mkdir(parents=True, exist_ok=True)
        if experiment:
            with _damage_of(place / RESULTS):
                found = read_experiment(content, place / RESULTS)
                write_tables(found, path)
                for table in found.tables:
                    console.print(table.terminal())
        else:
            record = decode_comparison(content, place / RESULTS)
            with _damage_of(place / RESULTS):
                write_report(record, path)
                show_comparison(console, record)
        console.print(f"written: {path}", highlight=False)


@contextmanager
def _damage_of(file: Path) -> Iterator[None]:
    """What statistics and tables stumble over is a value that no run has left there: one message for all of it."""
    try:
        yield
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        if isinstance(error, ScaloraError):
            raise
        reason = f"{type(error).__name__}: {error}"
        raise ScaloraError(f"{file} is damaged ({reason}): restore it, or name another folder") from error


def show_comparison(console: Console, record: ComparisonRecord) -> None:
    """A comparison's table for the terminal, and what it says in words."""
    from ..arena.extending import edge_sentence
    from ..arena.pruning import given_up_sentence
    from ..arena.table import comparison_table
    from ..arena.verdict import recommendation

    table = comparison_table(record.comparison, record.results)
    console.print(table.text("contender", "setting", "lr", "quality", "difference", "verdict", "time").terminal())
    comparison, results = record.comparison, record.results
    said = [record.admission.sentence, *table.in_words()]
    said += [given_up_sentence(results), edge_sentence(comparison, results), recommendation(table)]
    for line in filter(None, said):
        console.print(line, highlight=False)
