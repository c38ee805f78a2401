"""``scalora compare``: many methods on one recipe, tuned and measured alike."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.console import Console
from rich.live import Live

from ..common.disk_layout import REPORT, RESULTS
from ..common.errors import ScaloraError
from ..common.quiet import quiet
from .console import plain_console
from .guard import alone, guarded, leave, require
from .report import show_comparison

if TYPE_CHECKING:
    from ..arena.table import TextTable


def compare(
    recipe_path: Annotated[str, typer.Argument(metavar="RECIPE.yaml", help="Model, data and budget that all share.")],
    methods: Annotated[
        str,
        typer.Option(
            help="Who competes, separated by commas: method:option=value@rank, e.g. lora,lora@16. Of several values, "
            "written option=value/value, the best is chosen."
        ),
    ] = "lora,scalora-i",
    lr: Annotated[
        str, typer.Option(help="One grid of learning rates for all, separated by commas.")
    ] = "3e-4,1e-3,3e-3",
    alpha: Annotated[
        Optional[str],  # noqa: UP045  (typer reads it at run time)
        typer.Option(help="A grid of LoRA's alpha, tuned beside the rate, for the recipe's rank; its own by default."),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Final runs per method at its chosen setting.")] = 3,
    tuning_seeds: Annotated[int, typer.Option(help="Runs per setting and rate when choosing.")] = 1,
    output: Annotated[str, typer.Option(help="Folder for trials, results.json and report.html.")] = "runs/compare",
    curve: Annotated[bool, typer.Option(help="Last measure LoRA over rank 1 to 32: does rank matter here?")] = True,
    ranks: Annotated[
        bool, typer.Option(help="Measure the rank of each final update; dense updates take a minute and more for it.")
    ] = True,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed trials again.")] = False,
    prune: Annotated[
        bool, typer.Option(help="Give up tuning trials that are far behind another setting of their method.")
    ] = True,
    extend: Annotated[
        int, typer.Option(help="Rates beyond either end of the grid for a method that chose the last one.")
    ] = 2,
    confirm: Annotated[
        int, typer.Option(help="Tuning seeds more for the two settings of a method that lead; the better stays.")
    ] = 0,
    storage: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            envvar="SCALORA_STORAGE",
            metavar="URL",
            help="A database for the trials, so that several machines work on them: postgresql+psycopg://user@host/db.",
        ),
    ] = None,
    study: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="NAME", help="The comparison's name in --storage, the same on every machine."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the recipe; repeatable.")
    ] = None,
) -> None:
    """Compare methods on one recipe: each tuned on the same grid, then scored on the test split once per seed.

    Every trial is its own process. The same command continues a comparison that was stopped, and several may work on
    one at once; with --storage on several machines, each with an --output of its own.
    """
    with guarded():
        alone("compare")
        if not all(each.strip() for each in methods.split(",")):
            raise ScaloraError(f"--methods is {methods!r}: name one or more, separated by commas, e.g. lora,scalora-i")
        from ..runs.recipe import load_recipe

        recipe = load_recipe(recipe_path, set_ or [])
        quiet()
        require("compare", "optuna", "scipy")
        from ..arena.contender import Contender, parse_contender
        from ..arena.plan import CURVE_RANKS, Comparison
        from ..arena.run import Policy, check_comparison, refuse_strangers, run_comparison
        from ..arena.settle import settle_precision
        from ..arena.storage import read_storage, without_password

        folder, shared, words = Path(output), None, sys.argv[1:]
        if storage:
            shared = read_storage(storage, study)
            words = without_password(words, storage, shared)
        elif study is not None:
            raise ScaloraError(f"--study {study!r} names a comparison in a database: add --storage, or leave it out")
        refuse_strangers(folder)
        counts = ("--seeds", seeds, 1), ("--tuning-seeds", tuning_seeds, 1), ("--extend", extend, 0)
        for name, count, least in (*counts, ("--confirm", confirm, 0)):
            if count < least:
                raise ScaloraError(f"{name} is {count}: give {least} or more")
        comparison = Comparison(
            recipe,
            tuple(parse_contender(text.strip(), recipe.method.rank) for text in methods.split(",")),
            _numbers("--lr", lr, "3e-4,1e-3"),
            tuple(range(seeds)),
            tuple(range(tuning_seeds)),
            tuple(Contender("lora", rank) for rank in CURVE_RANKS) if curve else (),
            ranks=ranks,
            alphas=_numbers("--alpha", alpha, "4,16,64") if alpha is not None else (),
        )
        console = plain_console()
        command = shlex.join(["scalora", *words])
        comparison, choice = settle_precision(comparison, folder, shared)
        console.print(f"precision: {choice}", highlight=False)

        def log(line: str) -> None:
            console.print(line, highlight=False)

        try:
            policy = Policy(retry, prune, extend, confirm)
            inputs = check_comparison(comparison, folder, policy=policy, log=log, storage=shared)
            with _board(console) as show:
                record = run_comparison(
                    comparison,
                    folder,
                    command=command,
                    policy=policy,
                    log=log,
                    show=show,
                    inputs=inputs,
                    storage=shared,
                )
        except KeyboardInterrupt:
            leave(f"stopped; the same command continues it: {command}", 130)
        show_comparison(console, record)
        console.print(f"report: {folder / REPORT}   every trial: {folder / RESULTS}", highlight=False)


@contextmanager
def _board(console: Console) -> Iterator[Callable[[TextTable], None]]:
    """A table below all lines that fills while trials run; on a terminal only."""
    if not console.is_terminal:
        yield lambda table: None
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield lambda table: live.update(table.terminal(), refresh=True)


def _numbers(name: str, text: str, example: str) -> tuple[float, ...]:
    numbers = []
    for each in text.split(","):
        try:
            numbers.append(float(each))
        except ValueError:
            raise ScaloraError(f"{name} {each!r} is no number: separate numbers by commas, e.g. {example}") from None
    return tuple(numbers)
