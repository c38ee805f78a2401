"""The two pictures of a run."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_COLOURS = {
    "column": "#2a6f97",
    "scalar": "#e09f3e",
    "nonnegative": "#52796f",
    "normalize": "#9a6fb0",
    "none": "#b0b0b0",
}


def draw_curves(log: Sequence[dict[str, Any]], path: Path) -> None:
    """Training loss and learning rate over optimizer steps."""
    rows = [entry for entry in log if "loss" in entry]
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    left = figure.subplots()
    steps = [row["step"] for row in rows]
    left.plot(steps, [row["loss"] for row in rows], color="#2a6f97", label="loss")
    left.set(xlabel="optimizer step", ylabel="training loss", ylim=(0, None))
    left.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    right = left.twinx()
    right.plot(steps, [row.get("learning_rate", float("nan")) for row in rows], color="#e09f3e", label="learning rate")
    right.set(ylabel="learning rate", ylim=(0, None))
    right.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    figure.legend(*_handles(left, right), loc="outside upper center", ncols=2, frameon=False)
    save(figure, path)


def draw_rank(ranks: Sequence[dict[str, Any]], events: Sequence[dict[str, Any]], r: int, path: Path) -> None:
    """Rank of the accumulated update over steps; factors and kinds of solution over events, where there are any."""
    figure = Figure(figsize=(11 if events else 5, 4.0), layout="constrained")
    axes = figure.subplots(1, 3 if events else 1, squeeze=False)[0]
    _draw_ranks(axes[0], ranks, r)
    if events:
        _draw_factors(axes[1], events)
        _draw_kinds(axes[2], events)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Write a PNG to a temporary name, then rename it."""
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=130, format="png")
    os.replace(temporary, path)


def _draw_ranks(axis: Axes, ranks: Sequence[dict[str, Any]], r: int) -> None:
    for kind in ranks[0]["kinds"] if ranks else ():
        axis.plot([row["step"] for row in ranks], [row["kinds"][kind] for row in ranks], marker=".", label=kind)
    axis.axhline(r, color="grey", linestyle=":", label=f"LoRA, r = {r}")
    axis.set(xlabel="optimizer step", ylabel="mean rank of the update", ylim=(0, None), title="accumulated update")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _beside(axis)


def _draw_factors(axis: Axes, events: Sequence[dict[str, Any]]) -> None:
    steps = [event["step"] for event in events]
    for name, colour in (("alpha", "#2a6f97"), ("beta", "#bc4749")):
        low, middle, high = zip(*(event[name] for event in events), strict=True)
        axis.plot(steps, middle, color=colour, marker=".", label={"alpha": "α (of A)", "beta": "β (of B)"}[name])
        axis.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.axhline(1, color="grey", linestyle=":")
    axis.set(xlabel="optimizer step", ylabel="factor: median, least to greatest", yscale="log", title="column factors")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _beside(axis)


def _draw_kinds(axis: Axes, events: Sequence[dict[str, Any]]) -> None:
    kinds = [kind for kind in _COLOURS if any(kind in event["shares"] for event in events)]
    bottom = [0.0] * len(events)
    for kind in kinds:
        shares = [event["shares"].get(kind, 0.0) for event in events]
        axis.bar(range(len(events)), shares, bottom=bottom, width=1.0, color=_COLOURS[kind], label=kind)
        bottom = [b + s for b, s in zip(bottom, shares, strict=True)]
    axis.set(xlabel="event", ylabel="share of layers", ylim=(0, 1), title="kind of solution")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    _beside(axis)


def _beside(axis: Axes) -> None:
    """The legend below the axis, where it covers no line."""
    axis.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3, frameon=False)


def _handles(*axes: Axes) -> tuple[list[Any], list[Any]]:
    handles, labels = zip(*(axis.get_legend_handles_labels() for axis in axes), strict=True)
    return [h for group in handles for h in group], [label for group in labels for label in group]
