"""``scalora export``: a run as one plain LoRA, a whole model, or the dense difference."""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import Annotated, Any

import typer
from rich.table import Table

from ..common.quiet import quiet
from .console import plain_console
from .guard import alone, guarded


def export_verb(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run, a checkpoint or an adapter.")],
    to: Annotated[
        str, typer.Option(help="lora: one plain PEFT LoRA; merged: the whole model; delta: the dense difference.")
    ] = "lora",
    rank: Annotated[int | None, typer.Option(help="Truncate the LoRA to this rank; without it, it is exact.")] = None,
    energy: Annotated[
        float | None,
        typer.Option(help="Truncate each layer to the least rank that keeps this share of its squared norm."),
    ] = None,
    output: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder to write; RUN-FORM beside RUN by default.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(metavar="MODEL", help="The base model, if it is not where the run found it.")
    ] = None,
    examples: Annotated[int, typer.Option(help="Held-out examples to measure the loss on; 0 for none.")] = 64,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
) -> None:
    """Turn a run into what others load: a plain LoRA, a whole model, or a dense difference.

    The result is loaded back and its logits are compared; with a recipe's data, its loss too.
    """
    with guarded():
        alone("export")
        quiet()
        from ..runs.export.export import export as export_run

        console = plain_console()
        done = export_run(
            run, to=to, rank=rank, energy=energy, output=output, base=base, overwrite=overwrite, examples=examples,
            log=lambda text: console.print(text, highlight=False, soft_wrap=True),
        )  # fmt: skip
        if rank is not None or energy is not None:
            console.print(_kept(done.kept))
        elif done.kept:
            console.print(f"rank {span([layer.rank for layer in done.kept.values()])}, exact", highlight=False)
        console.print(
            f"loaded back: logits differ by at most {done.difference:.2g} (largest logit {done.largest:.3g})",
            highlight=False,
        )
        if done.loss is None:
            console.print(done.loss_about, highlight=False, soft_wrap=True)
        else:
            before, after = done.loss
            change = f"{before:.4f} → {after:.4f} ({after - before:+.2g})"
            console.print(f"loss {change}, {done.loss_about}", highlight=False)
        console.print(f"{to}: {done.folder}", highlight=False, soft_wrap=True)


def _kept(kept: dict[str, Any]) -> Table:
    """Ranks and kept energies per kind of layer."""
    groups: dict[str, list[Any]] = defaultdict(list)
    for name, layer in kept.items():
        groups[name.rsplit(".", 1)[-1]].append(layer)
    table = Table(title="kept of each layer's update (all layers: export.json)", title_justify="left")
    for column in ("layer", "number", "columns", "rank", "least energy", "median energy"):
        table.add_column(column, justify="left" if column == "layer" else "right")
    for kind, layers in groups.items():
        energies = [layer.energy for layer in layers]
        table.add_row(
            kind, str(len(layers)), span([layer.columns for layer in layers]), span([layer.rank for layer in layers]),
            f"{min(energies):.4%}", f"{median(energies):.4%}",
        )  # fmt: skip
    return table


def span(values: list[int]) -> str:
    """One number, or the smallest and the largest."""
    return str(min(values)) if min(values) == max(values) else f"{min(values)}–{max(values)}"
