"""Several comparisons that make one table: a problem each, methods down the side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import mean, median
from typing import Any, Literal, NamedTuple

from scalora.arena.plan import Comparison, Contender
from scalora.arena.run import Policy, check_comparison, run_comparison
from scalora.arena.settle import settle_precision
from scalora.arena.statistics import (
    Difference,
    Results,
    chosen_settings,
    final_runs,
    hardware,
    paired_difference,
    primary,
    summarize,
)
from scalora.runs.recipe import Recipe

from .base import Outcome, Setting, TextTable
from .paper_scale import PLAN_COLUMNS, PLAN_TITLE, plan

Published = Mapping[str, Mapping[str, float]]  # contender's name → problem → number


class Problem(NamedTuple):
    """One column of a table. At ``fixed`` rates nothing is tuned; ``rows`` are those to train on, for the plan."""

    name: str
    recipe: Recipe
    fixed: dict[Contender, float] | None = None
    rows: int = 0


@dataclass(frozen=True)
class Measured:
    """A finished comparison."""

    comparison: Comparison
    results: Results

    def finals(self, contender: Contender) -> dict[int, Mapping[str, Any]]:
        """The results of its final runs, by seed."""
        return final_runs(self.results, chosen_settings(self.results, self.comparison).get(contender))

    def costs(self, contender: Contender, key: str) -> list[float]:
        """Relative to LoRA's, seed by seed: runs of one seed train on the same batches, one soon after the other.

        Without seeds that ran on unlike hardware: what is resumed may go on elsewhere.
        """
        ours, base = self.finals(contender), self.finals(self.comparison.contenders[0])
        both = [seed for seed in sorted(ours.keys() & base.keys()) if hardware(ours[seed]) == hardware(base[seed])]
        return [ours[seed][key] / base[seed][key] for seed in both]

    def values(self, contender: Contender) -> dict[int, float]:
        """Test metric by seed."""
        metric, _ = primary(self.results)
        return {seed: run["after"][metric] for seed, run in self.finals(contender).items()}

    def mean(self, contender: Contender) -> tuple[float, float]:
        """Mean of the test metric and its standard error; (NaN, NaN) where every run failed."""
        values = list(self.values(contender).values())
        if not values:
            return float("nan"), float("nan")
        found = summarize(values)
        return found.value, found.error

    def against_lora(self, contender: Contender) -> Difference | None:
        """Paired difference to the first contender, which is LoRA."""
        _, higher = primary(self.results)
        first = self.comparison.contenders[0]
        return paired_difference(self.values(contender), self.values(first), higher_is_better=higher)


def measure(
    setting: Setting, problems: Sequence[Problem], contenders: tuple[Contender, ...], *, rates: tuple[float, ...],
    seeds: int, tuning_seeds: int = 1, chosen_by: Literal["nll"] | None = None, ranks: bool = True,
) -> dict[str, Measured]:  # fmt: skip
    """Run or continue a comparison per problem, each in a folder of its own below the experiment's."""
    comparisons = {
        problem.name: Comparison(
            problem.recipe, contenders, rates, tuple(range(seeds)), tuple(range(tuning_seeds)), fixed=problem.fixed,
            chosen_by=chosen_by, ranks=ranks,
        )
        for problem in problems
    }  # fmt: skip
    settled = {name: settle_precision(each, setting.folder / name) for name, each in comparisons.items()}
    inputs = {  # of all at first: the last set's data must not be found wanting after hours
        name: check_comparison(comparison, setting.folder / name, policy=Policy(retry=setting.retry), log=setting.log)
        for name, (comparison, _) in settled.items()
    }
    found = {}
    for name, (comparison, choice) in settled.items():
        setting.log(f"{name}: {comparison.recipe.model}; precision: {choice}")
        folder = setting.folder / name
        record = run_comparison(
            comparison,
            folder,
            command=setting.command,
            policy=Policy(retry=setting.retry),
            log=setting.log,
            inputs=inputs[name],
        )
        found[name] = Measured(comparison, record.results)
    return found


def quality(title: str, measured: Mapping[str, Measured], published: Published, percent: bool = True) -> TextTable:
    """Mean ± standard error per contender and problem, the published number in brackets, and the mean over problems."""
    contenders = next(iter(measured.values())).comparison.contenders
    rows = []
    for contender in contenders:
        printed = published.get(_name(contender, contenders), {})
        cells, means = [], []
        for problem, each in measured.items():
            values = list(each.values(contender).values())
            if not values:
                cells.append("failed")
                continue
            m = summarize(values)
            means.append(m.value)
            error = f" ± {_number(m.error, percent)}" if isfinite(m.error) else ""
            paper = f" ({_number(printed[problem], percent)})" if problem in printed else ""
            cells.append(f"{_number(m.value, percent)}{error}{paper}")
        average = _number(mean(means), percent) if len(means) == len(measured) else ""
        paper = f" ({_number(printed['mean'], percent)})" if average and "mean" in printed else ""
        rows.append([str(contender), *cells, f"{average}{paper}"])
    return TextTable(title, ["method", *measured, "mean"], rows)


def costs(measured: Mapping[str, Measured], memory_above: Mapping[str, float]) -> TextTable:
    """Seconds per step and peak memory relative to LoRA: median (lowest to highest) over seeds and problems.

    What never ran on LoRA's hardware has none. Beside it the paper's memory above LoRA, of another model.
    """
    contenders = next(iter(measured.values())).comparison.contenders
    rows = []
    for contender in contenders:
        cells = []
        for key in ("seconds_per_step", "peak_memory_bytes"):
            ratios = [ratio for each in measured.values() for ratio in each.costs(contender, key)]
            unknown = "" if any(each.finals(contender) for each in measured.values()) else "failed"
            cells.append(f"{median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})" if ratios else unknown)
        above = memory_above.get(_name(contender, contenders))
        rows.append([str(contender), *cells, "" if above is None else f"+{above:g} GB"])
    return TextTable(
        "cost relative to LoRA: median (lowest to highest)",
        ["method", "seconds per step", "peak memory", "memory above LoRA, paper"],
        rows,
    )


def verdicts(measured: Mapping[str, Measured]) -> list[str]:
    """A sentence per contender: on how many problems it differs from LoRA by more than noise."""
    contenders = next(iter(measured.values())).comparison.contenders
    lines = []
    for contender in contenders[1:]:
        counts = Counter(d.verdict for each in measured.values() if (d := each.against_lora(contender)))
        said = ", ".join(f"{verdict} on {count}" for verdict, count in counts.most_common())
        lines.append(f"{contender} against {contenders[0]}, of {len(measured)} problems: {said or 'no result'}.")
    return lines


def summary(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """For results.json; every trial is in the problem's own folder."""
    return {
        problem: {
            "metric": primary(each.results)[0],
            "chosen": {str(setting): lr for setting, lr in chosen_settings(each.results, each.comparison).values()},
            "final": {str(c): each.values(c) for c in each.comparison.contenders},
        }
        for problem, each in measured.items()
    }


def plans(problems: Sequence[Problem], head: Any) -> Outcome:
    """What the recipes of large models would train and take, without their weights."""
    rows = {problem.name: plan(problem.recipe, head, problem.rows) for problem in problems}
    tables = [
        TextTable(
            f"{model}: {PLAN_TITLE}",
            ["problem", *PLAN_COLUMNS],
            [[n, *p.row()] for n, p in rows.items() if p.model == model],
        )
        for model in dict.fromkeys(each.model for each in rows.values())
    ]
    return Outcome({"plans": {name: vars(each) for name, each in rows.items()}}, tables)


def _name(contender: Contender, contenders: Sequence[Contender]) -> str:
    """As the papers' numbers are listed: by method, with the rank where it is not the table's."""
    return contender.method if contender.rank == contenders[0].rank else f"{contender.method}@{contender.rank}"


def _number(value: float, percent: bool) -> str:
    return f"{100 * value:.2f}" if percent else f"{value:.4f}"
