"""The pictures of a report, as inline SVG so that the page is one file."""

from __future__ import annotations

import io
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from math import isfinite
from statistics import mean, stdev
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .contender import Contender
from .plan import Chosen
from .statistics import Mean, Results, final_runs, over_rates
from .table import ComparisonTable
from .verdict import COSTS, CostKind, frontier

_COLOURS = mpl.color_sequences["tab20"][::2] + mpl.color_sequences["tab20"][1::2]  # strong hues first
_SIZE = (9.6, 5.4)
_BANDS = 8  # contenders up to which bands can be told apart
_SMOOTH = 0.15  # weight of a new loss in the running mean that is drawn


def sensitivity(results: Results, chosen: dict[Contender, Chosen], metric: str) -> str:
    """Validation metric over learning rate at the chosen setting, a line per contender, spread over tuning seeds."""

    def draw(axis: Axes) -> None:
        for contender, colour in _coloured(list(chosen)):
            found = over_rates(results, chosen[contender].contender, metric)
            middle = [mean(values) for values in found.values()]
            axis.plot(list(found), middle, marker="o", color=colour, label=str(contender))
            axis.fill_between(list(found), *_spread(list(found.values())), color=colour, alpha=0.12, linewidth=0)
        axis.set(xscale="log", xlabel="learning rate (of the common grid)", ylabel=f"validation {metric}")

    return _svg(draw)


def rank_curve(points: Mapping[int, Mean], metric: str) -> str:
    """LoRA's best validation metric over its rank."""

    def draw(axis: Axes) -> None:
        values = [point.value for point in points.values()]
        spread = {"yerr": [point.error for point in points.values()], "capsize": 3}
        axis.errorbar(list(points), values, marker="o", color=_COLOURS[0], label="LoRA", **spread)
        axis.set(xscale="log", xlabel="rank of LoRA", ylabel=f"validation {metric} at its best setting")
        axis.set_xticks(list(points), list(map(str, points)), minor=False)
        axis.minorticks_off()

    return _svg(draw)


def learning_curves(results: Results, chosen: dict[Contender, Chosen]) -> str:
    """Running mean of the training loss over steps at the chosen rates, with bands over seeds."""
    return _svg(lambda axis: _over_steps(axis, results, chosen, _smoothed, "training loss (running mean)"))


def _smoothed(result: Any) -> list[list[float]]:
    smooth, running = [], None
    for step, loss in result["losses"]:
        running = loss if running is None else running + _SMOOTH * (loss - running)
        smooth.append([step, running])
    return smooth


def ranks(results: Results, chosen: dict[Contender, Chosen]) -> str:
    """Mean rank of the accumulated update over steps at the chosen rates."""

    def series(result: Any) -> list[list[float]]:
        return [[row["step"], row["mean"]] for row in result["ranks"]]

    def draw(axis: Axes) -> None:
        _over_steps(axis, results, chosen, series, "mean rank of the update")
        axis.set_yscale("log")

    return _svg(draw)


def quality_over_cost(table: ComparisonTable, cost: CostKind) -> str:
    """Test metric over a cost, of those for which it is known; a line joins the Pareto front, by means."""
    front = frontier(table, cost)

    def draw(axis: Axes) -> None:
        for row, (contender, colour) in zip(table.rows, _coloured([row.contender for row in table.rows]), strict=True):
            if (at := getattr(row, cost)) is None:
                continue
            ahead = row in front
            point = {"marker": "o", "capsize": 3, "color": colour, "label": str(contender)}
            size = {"markersize": 9, "markeredgecolor": "black"} if ahead else {"markersize": 5, "alpha": 0.6}
            error = row.quality.error if isfinite(row.quality.error) else 0.0
            axis.errorbar([_unit(cost, at)], [row.quality.value], yerr=[error], **point, **size)
        at, values = [_unit(cost, getattr(row, cost)) for row in front], [row.quality.value for row in front]
        axis.plot(at, values, color="black", linewidth=0.8, linestyle="--", zorder=0, drawstyle="steps-post")
        relative = "MiB" if cost == "disk" else f"{table.baseline} = 1"
        axis.set(xlabel=f"{COSTS[cost]}, {relative}", ylabel=f"test {table.metric}")
        axis.set_xscale("log" if cost == "disk" else "linear")
        values = [row.quality.value for row in table.rows]
        if values and not table.higher_is_better and 0 < 10 * min(values) < max(values):
            axis.set_yscale("log")

    return _svg(draw)


def _unit(cost: CostKind, value: float) -> float:
    return value / 2**20 if cost == "disk" else value


def _over_steps(
    axis: Axes, results: Results, chosen: dict[Contender, Chosen], series: Callable[[Any], Any], label: str
) -> None:
    for contender, colour in _coloured(list(chosen)):
        by_step: dict[float, list[float]] = defaultdict(list)
        for result in final_runs(results, chosen[contender]).values():
            for step, value in series(result):
                by_step[step].append(value)
        if by_step:
            steps = sorted(by_step)
            axis.plot(steps, [mean(by_step[s]) for s in steps], color=colour, label=str(contender))
            if len(chosen) <= _BANDS:
                axis.fill_between(steps, *_spread([by_step[s] for s in steps]), color=colour, alpha=0.12, linewidth=0)
    axis.set(xlabel="optimizer step", ylabel=label)


def _spread(groups: Sequence[Sequence[float]]) -> tuple[list[float], list[float]]:
    half = [stdev(values) if len(values) > 1 else 0.0 for values in groups]
    middle = [mean(values) for values in groups]
    return [m - h for m, h in zip(middle, half, strict=True)], [m + h for m, h in zip(middle, half, strict=True)]


def _coloured(contenders: Sequence[Contender]) -> list[tuple[Contender, Any]]:
    return [(contender, _COLOURS[i % len(_COLOURS)]) for i, contender in enumerate(contenders)]


def _svg(draw: Callable[[Axes], None]) -> str:
    figure = Figure(figsize=_SIZE, layout="constrained")
    axis = figure.subplots()
    draw(axis)
    axis.grid(alpha=0.25)
    if axis.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    stream = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "scalora"}):  # the same results give the same page, byte for byte
        figure.savefig(stream, format="svg", metadata={"Date": None})
    drawn = stream.getvalue()
    return f"<figure>{drawn[drawn.index('<svg') :]}</figure>"
