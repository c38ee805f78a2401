"""``scalora reproduce``: the papers' figures and tables."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table as RichTable

from ..common.errors import ScaloraError
from ..common.quiet import quiet
from .guard import guarded, leave, require

if TYPE_CHECKING:
    from scalora_papers import Outcome

_SCALES = ("small", "paper")


def run(name: str, *, scale: str, data: str | None, output: str | None, resume: bool, retry: bool, plan: bool) -> None:
    """Run an experiment, or list them all; exit codes as :mod:`scalora.cli.guard` says."""
    console = Console()
    with guarded():
        quiet()
        require("reproduce", "optuna", "scipy", "sklearn")
        from scalora_papers import Setting, all_experiments, find_experiment
        from scalora_papers.run import default_folder, run_experiment

        if not name:
            listing = RichTable("name", "what it is")
            for each in all_experiments().values():
                listing.add_row(each.name, each.summary)
            console.print(listing)
            return
        experiment = find_experiment(name)
        if scale not in _SCALES:
            raise ScaloraError(f"--scale is {scale!r}: choose {' or '.join(_SCALES)}")
        if data is not None and not Path(data).is_dir():
            raise ScaloraError(f"--data {data}: there is no such folder")
        command = shlex.join(["scalora", *sys.argv[1:]])
        setting = Setting(
            scale,  # pyright: ignore[reportArgumentType]
            Path(output).expanduser() if output else default_folder(name, scale),
            None if data is None else Path(data),
            lambda line: console.print(line, highlight=False),
            command,
            retry,
        )
        if plan:
            _show(console, experiment.plan(setting))
            return
        try:
            outcome = run_experiment(experiment, setting, resume=resume or retry)
        except KeyboardInterrupt:
            leave(f"stopped; continue with: {command}{'' if resume or retry else ' --resume'}", 130)
        _show(console, outcome)
        console.print(f"results, tables and figures: {setting.folder}", highlight=False)


def _show(console: Console, outcome: Outcome) -> None:
    for table in outcome.tables:
        shown = RichTable(title=table.title, title_justify="left")
        # On a narrow screen nothing is cut off, and what a row is stays whole.
        for place, column in enumerate(table.columns):
            shown.add_column(column, no_wrap=place == 0, overflow="fold")
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    for remark in outcome.remarks:
        console.print(f"• {remark}", highlight=False)
