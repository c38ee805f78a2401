"""The table of a comparison: a row of named figures per contender, and tables of text for page, Markdown and screen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from math import isfinite
from statistics import mean
from typing import TYPE_CHECKING, Any

from .contender import Contender
from .plan import Comparison
from .statistics import (
    Difference,
    Mean,
    Results,
    chosen_settings,
    final_runs,
    over_rates,
    paired_difference,
    primary,
    relative_cost,
    relative_range,
    summarize,
)

if TYPE_CHECKING:
    import rich.table


SHARED = 0.05  # of the time of steps spent waiting for a core: from there on, others used the machine


@dataclass(frozen=True)
class TextTable:
    """Texts under column names, and three ways to show them."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        lines = [_line(self.columns), _line(["---"] * len(self.columns)), *map(_line, self.rows), ""]
        return "\n".join([f"**{self.title}**", "", *lines] if self.title else lines)

    def html(self) -> str:
        titles = "".join(f"<th>{escape(title)}</th>" for title in self.columns)
        lines = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in self.rows)
        return f"<table><caption>{escape(self.title)}</caption><tr>{titles}</tr>{lines}</table>"

    def terminal(self) -> rich.table.Table:
        """For a rich console. On a narrow screen nothing is cut off, and what a row is stays whole."""
        from rich.table import Table
        from rich.text import Text

        shown = Table(title=Text(self.title, style="table.title"), title_justify="left")
        for place, column in enumerate(self.columns):
            shown.add_column(Text(column), no_wrap=place == 0, overflow="fold")
        for row in self.rows:
            shown.add_row(*map(Text, row))
        return shown


@dataclass(frozen=True)
class ContenderRow:
    """What a contender reached at what was chosen for it, and what it took."""

    contender: Contender
    setting: Mapping[str, Any]  # option → its chosen value, of those for which several were tried
    lr: float
    scores: Mapping[int, float]  # seed → test metric
    difference: Difference | None  # to the baseline; None for itself and where they share no seed
    trainable: int
    time: float | None  # seconds per step relative to the baseline's; None where they never met on one machine
    memory: float | None  # peak bytes, likewise
    held: float | None  # bytes of what is trained, gradients, optimizer and store; None in results of before they were
    disk: float  # bytes of the saved adapter
    validation: Mapping[float, Sequence[float]]  # learning rate → validation metric by tuning seed; without failed ones
    times: tuple[float, float] | None = None  # the least and greatest of the runs, relative as `time` is
    waited: float | None = None  # greatest share of a run's steps, or of the baseline's, that waited for a core

    @property
    def shared(self) -> bool:
        """Whether others used the machine while it was timed, so that its times say little."""
        return self.waited is not None and self.waited > SHARED

    @property
    def quality(self) -> Mean:
        """Of the test metric, over seeds."""
        return summarize(list(self.scores.values()))


# Field → its column's title, and its text. {baseline} is who the others are held against.
_FIELDS: dict[str, tuple[str, Callable[[ContenderRow], str]]] = {
    "contender": ("method", lambda row: str(row.contender)),
    "setting": ("chosen", lambda row: setting_text(row.setting)),
    "lr": ("lr", lambda row: f"{row.lr:g}"),
    "quality": ("test {metric}", lambda row: _quality(row.quality)),
    "seeds": ("seeds", lambda row: str(row.quality.n)),
    "difference": ("gain over {baseline} (95 %), plus is better", lambda row: _difference(row.difference)),
    "wins": ("wins", lambda row: f"{row.difference.wins}/{row.difference.n}" if row.difference else ""),
    "verdict": ("verdict", lambda row: row.difference.verdict if row.difference else ""),
    "trainable": ("trainable", lambda row: f"{row.trainable:,}"),
    "time": ("time ratio", lambda row: _ratio(row.time) + (" (machine shared)" if row.shared else "")),
    "memory": ("memory ratio", lambda row: _ratio(row.memory)),
    "held": ("held", lambda row: "" if row.held is None else _size(row.held)),
    "disk": ("on disk", lambda row: _size(row.disk)),
}
EVERY_FIELD = tuple(_FIELDS)


@dataclass(frozen=True)
class ComparisonTable:
    """A row per contender that has finished a final seed, in the order they were named."""

    metric: str
    higher_is_better: bool
    baseline: Contender
    rates: tuple[float, ...]  # of the grid, and those chosen beyond it, ascending
    rows: list[ContenderRow]
    tuned_on: int = 1  # tuning seeds of the whole grid

    @property
    def caption(self) -> str:
        better = "higher is better" if self.higher_is_better else "lower is better"
        return f"test {self.metric} ({better}): mean ± standard error over seeds"

    def best_first(self) -> ComparisonTable:
        """The same rows, the best test metric first."""
        rows = sorted(self.rows, key=lambda row: row.quality.value, reverse=self.higher_is_better)
        return replace(self, rows=rows)

    def text(self, *fields: str, rates: bool = False) -> TextTable:
        """Some fields as text, and with ``rates`` the validation metric at each rate, at the chosen setting.

        Without a grid beside that of the rates nothing else is chosen, and there is no such column.
        """
        fields = tuple(name for name in fields if name != "setting" or any(row.setting for row in self.rows))
        titles = [_FIELDS[name][0].format(metric=self.metric, baseline=self.baseline) for name in fields]
        shown = self.rates if rates else ()
        rows = [
            [_FIELDS[name][1](row) for name in fields]
            + [over_seeds(row.validation.get(rate, ()), self.tuned_on, 3) for rate in shown]
            for row in self.rows
        ]
        return TextTable(self.caption, titles + [f"{rate:g}" for rate in shown], rows)

    def in_words(self) -> list[str]:
        """A sentence per contender on its difference to the baseline."""
        return [
            f"{row.contender}: gain over {self.baseline} {_difference(row.difference)}, {row.difference.verdict} "
            f"({row.difference.wins}/{row.difference.n} seeds won)."
            for row in self.rows
            if row.difference
        ]


def comparison_table(comparison: Comparison, results: Results, baseline: Contender | None = None) -> ComparisonTable:
    """The figures of every contender, held against `baseline`; without one, against LoRA."""
    metric, higher = primary(results)
    chosen = chosen_settings(results, comparison)
    base = baseline or lora_of(comparison)
    runs = {c: final_runs(results, chosen.get(c)) for c in (*comparison.contenders, base)}
    values = {c: {seed: run["after"][metric] for seed, run in found.items()} for c, found in runs.items()}
    rows = []
    for contender in comparison.contenders:
        ours, theirs = list(runs[contender].values()), list(runs[base].values())
        if not ours:
            continue
        choice = chosen[contender]
        found = over_rates(results, choice.contender, metric)
        rows.append(
            ContenderRow(
                contender,
                comparison.varied(contender, choice),
                choice.lr,
                values[contender],
                paired_difference(values[contender], values[base], higher_is_better=higher)
                if contender != base
                else None,
                ours[0]["trainable_parameters"],
                relative_cost(ours, theirs, "seconds_per_step"),
                relative_cost(ours, theirs, "peak_memory_bytes"),
                mean(run["held_bytes"] for run in ours) if all(run.get("held_bytes") for run in ours) else None,
                mean(run["adapter_bytes"] for run in ours),
                found,
                relative_range(ours, theirs, "seconds_per_step"),
                max(
                    (run["waited_share"] for run in ours + theirs if run.get("waited_share") is not None), default=None
                ),
            )
        )
    rates = sorted({*comparison.rates, *(row.lr for row in rows)})
    return ComparisonTable(metric, higher, base, tuple(rates), rows, len(comparison.tuning_seeds))


def over_seeds(values: Sequence[float], usual: int, digits: int) -> str:
    """The mean of a validation metric; and of how many seeds, where these are not the usual ones of the grid."""
    if not values:
        return ""
    seeds = "" if len(values) == usual else f" ({len(values)} seed{'s' * (len(values) > 1)})"
    return f"{mean(values):.{digits}f}{seeds}"


def lora_of(comparison: Comparison) -> Contender:
    """LoRA at the recipe's rank, or else the first LoRA there is."""
    same = Contender("lora", comparison.recipe.method.rank)
    others = [c for c in comparison.contenders if c.method == "lora"]
    return same if same in comparison.contenders or not others else others[0]


def setting_text(setting: Mapping[str, Any]) -> str:
    """Options and their values."""
    return ", ".join(f"{name}={value}" for name, value in setting.items())


def _quality(m: Mean) -> str:
    return f"{m.value:.4f}" + (f" ± {m.error:.4f}" if isfinite(m.error) else "")


def _difference(d: Difference | None) -> str:
    if d is None:
        return ""
    return f"{d.value:+.4f}" + (f" [{d.low:+.4f}, {d.high:+.4f}]" if isfinite(d.low) else "")


def _size(size: float) -> str:
    """In MiB, or in the unit in which it is more than nothing."""
    if size >= 0.1 * 2**20:
        return f"{size / 2**20:.1f} MiB"
    return f"{size / 2**10:.1f} KiB" if size >= 0.1 * 2**10 else f"{size:.0f} B"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '∣') for cell in cells)} |"
