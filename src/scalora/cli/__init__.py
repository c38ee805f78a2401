"""The command line: one file per verb, which imports what is heavy when it is asked for, so that help is instant."""

from __future__ import annotations

from typing import Annotated

import typer

from .compare import compare
from .doctor import doctor
from .evaluate import evaluate_verb
from .export import export_verb
from .inspect import inspect
from .methods import methods
from .report import report
from .reproduce import reproduce
from .train import train_verb


def _say_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"scalora {version('scalora')}")
        raise typer.Exit


app = typer.Typer(
    name="scalora",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fine-tune language models with [b]ScaLoRA[/b] (arXiv 2510.23818): LoRA's memory, high-rank updates.\n\n"
    "Begin with [b]scalora train recipes/demo.yaml[/b]; see what this machine has with [b]scalora doctor[/b].",
)


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", help="Say the version and exit.", is_eager=True, callback=_say_version)
    ] = False,
) -> None:
    """Each verb has its own --help."""


for _verb in (train_verb, evaluate_verb, export_verb, inspect, compare, report, reproduce, methods, doctor):
    app.command(_verb.__name__.removesuffix("_verb"))(_verb)
