"""``scalora reproduce``: the papers' figures and tables."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table as RichTable

from ..common.errors import ScaloraError
from ..common.files import expand_user
from ..common.quiet import quiet
from .console import plain_console
from .guard import alone, guarded, leave, require

if TYPE_CHECKING:
    from scalora_papers import Outcome

_SCALES = ("small", "paper")


def reproduce(
    name: Annotated[str, typer.Argument(metavar="NAME", help="fig1, table1, …; without it they are listed.")] = "",
    scale: Annotated[
        str, typer.Option(help="small: minutes to hours on a laptop; paper: the paper's models and settings.")
    ] = "small",
    data: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Folder with the GLUE, commonsense and mathematics files, where needed."),
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder for results; runs/reproduce/NAME-SCALE by default.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue what the output folder holds.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="The same, and run failed trials again.")] = False,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Only check the paper-scale recipes, without weights, and say what they take."),
    ] = False,
) -> None:
    """Rerun a figure or a table of the ScaLoRA paper (2510.23818) or the α-LoRA paper (2510.21345).

    Leaves results.json, tables.md with published and obtained numbers side by side, and the figures.
    """
    console = plain_console()
    with guarded():
        alone("reproduce")
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
            expand_user(output) if output else default_folder(name, scale),
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
        console.print(table.terminal())
    for remark in outcome.remarks:
        console.print(f"• {remark}", highlight=False)
