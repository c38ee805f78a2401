"""``scalora export``: a run as one plain LoRA, a whole model, or the dense difference."""

from __future__ import annotations

from collections import defaultdict
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from ..common.quiet import quiet
from .guard import guarded


def run(
    path: str, *, to: str, rank: int | None, energy: float | None, output: str | None, base: str | None,
    overwrite: bool, examples: int,
) -> None:  # fmt: skip
    """Export and print what was kept and how it compares; exit codes as :mod:`scalora.cli.guard` says."""
    with guarded():
        quiet()
        from ..runs.export.export import export

        console = Console()
        done = export(
            path, to=to, rank=rank, energy=energy, output=output, base=base, overwrite=overwrite, examples=examples,
            tell=lambda text: console.print(text, highlight=False, soft_wrap=True),
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
