"""The command line: one file per verb, imported when it is asked for, so that help is instant."""

from __future__ import annotations

from typing import Annotated, Optional

import typer

app = typer.Typer(
    name="scalora",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Fine-tune language models with [b]ScaLoRA[/b] (arXiv 2510.23818): LoRA's memory, high-rank updates.\n\n"
    "Begin with [b]scalora train recipes/demo.yaml[/b]; see what this machine has with [b]scalora doctor[/b].",
)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE.yaml", help="What is trained, on what, how, and where to.")],
    set_: Annotated[
        Optional[list[str]],  # noqa: UP045  (typer reads it at run time)
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Replace a value, e.g. training.learning_rate=1e-3; repeatable."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the output folder's last checkpoint.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier run; it is kept as <output>.previous.")
    ] = False,
) -> None:
    """Fine-tune by a recipe and score before and after.

    Leaves metrics.json, the resolved recipe, the adapter in PEFT's format, curves.png and rank.png in the output.
    Ctrl-C finishes the step, saves a checkpoint and exits with 130.
    """
    from .train import run

    run(recipe, set_ or [], resume=resume, overwrite=overwrite)


@app.command()
def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run, a checkpoint or an adapter.")],
    to: Annotated[
        str,
        typer.Option(help="lora: one plain PEFT LoRA; merged: the whole model; delta: the dense difference."),
    ] = "lora",
    rank: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Truncate the LoRA to this rank; without it, it is exact."),
    ] = None,
    energy: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="Truncate each layer to the least rank that keeps this share of its squared norm."),
    ] = None,
    output: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="DIR", help="Folder to write; RUN-FORM beside RUN by default."),
    ] = None,
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="MODEL", help="The base model, if it is not where the run found it."),
    ] = None,
    examples: Annotated[int, typer.Option(help="Held-out examples to measure the loss on; 0 for none.")] = 64,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Turn a run into what others load: a plain LoRA, a whole model, or a dense difference.

    The result is loaded back and its logits are compared; with a recipe's data, its loss too.
    """
    from .export import run as run_export

    run_export(
        run, to=to, rank=rank, energy=energy, output=output, base=base, overwrite=overwrite, examples=examples
    )  # fmt: skip


@app.command()
def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="A run, a checkpoint, an adapter or an export.")],
    as_json: Annotated[bool, typer.Option("--json", help="For machines, with every layer.")] = False,
) -> None:
    """Show ranks, norms, sizes and origin of what lies in a folder, without loading a model."""
    from .inspect import run

    run(path, as_json=as_json)


@app.command()
def compare(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE.yaml", help="Model, data and budget that all share.")],
    methods: Annotated[
        str,
        typer.Option(help="Who competes, separated by commas; method@rank for a rank of its own, e.g. lora,lora@16."),
    ] = "lora,scalora-i",
    lr: Annotated[
        str, typer.Option(help="One grid of learning rates for all, separated by commas.")
    ] = "3e-4,1e-3,3e-3",
    seeds: Annotated[int, typer.Option(help="Final runs per method at its chosen rate.")] = 3,
    tuning_seeds: Annotated[int, typer.Option(help="Runs per method and rate when choosing.")] = 1,
    output: Annotated[str, typer.Option(help="Folder for trials, results.json and report.html.")] = "runs/compare",
    curve: Annotated[bool, typer.Option(help="First measure LoRA over rank 1 to 32: does rank matter here?")] = True,
    retry: Annotated[bool, typer.Option("--retry", help="Run failed trials again.")] = False,
    set_: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the recipe; repeatable."),
    ] = None,
) -> None:
    """Compare methods on one recipe: each tuned on the same grid, then scored on the test split once per seed.

    Every trial is its own process. The same command continues a comparison that was stopped, and several may work on
    one at once.
    """
    from .compare import run

    run(
        recipe, set_ or [], methods=methods, lr=lr, seeds=seeds, tuning_seeds=tuning_seeds, output=output, curve=curve,
        retry=retry,
    )  # fmt: skip


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(metavar="NAME", help="fig1, table1, …; without it they are listed.")] = "",
    scale: Annotated[
        str, typer.Option(help="small: minutes to hours on a laptop; paper: the paper's models and settings.")
    ] = "small",
    data: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="DIR", help="Folder with the GLUE, commonsense and mathematics files, where needed."),
    ] = None,
    output: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="DIR", help="Folder for results; runs/reproduce/NAME-SCALE by default."),
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
    from .reproduce import run

    run(name, scale=scale, data=data, output=output, resume=resume, retry=retry, plan=plan)


@app.command()
def methods() -> None:
    """List the methods that a recipe can name, with their options."""
    from .methods import run

    run()


@app.command()
def doctor() -> None:
    """Tell versions, devices, and what is reachable and cached."""
    from .doctor import run

    run()
