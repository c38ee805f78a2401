"""From trials to statements: what is chosen, means and intervals, and whether a difference is more than noise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import mean, median, stdev
from typing import Any, Literal

from scipy import stats

from .contender import Contender
from .plan import Chosen, Comparison, Trial

ENOUGH_SEEDS = 3  # of fewer, chance gives any difference and any spread
Results = Mapping[Trial, Mapping[str, Any]]


@dataclass(frozen=True)
class Mean:
    """Mean over seeds and its standard error (NaN for a single seed)."""

    value: float
    error: float
    n: int


@dataclass(frozen=True)
class Difference:
    """Paired difference to a baseline over common seeds, as improvement: positive is better."""

    value: float
    error: float  # standard error; NaN for a single seed
    low: float  # 95 % interval, Student's t; infinite for a single seed
    high: float
    wins: int
    n: int

    @property
    def verdict(self) -> str:
        """In words, whether this is more than noise."""
        if self.n < 2:
            return "one seed says nothing about noise"
        if self.low > 0:
            return "better"
        if self.high < 0:
            return "worse"
        return "within noise"


def primary(results: Results) -> tuple[str, bool]:
    """Name of the metric that decides, and whether higher is better."""
    first = next((r for r in results.values() if "after" in r), None)
    return (first["primary"], first["higher_is_better"]) if first else ("nll", False)


def in_order(results: Results) -> list[tuple[Trial, Mapping[str, Any]]]:
    """Trials and results, sorted by the trial."""
    return sorted(results.items(), key=lambda item: item[0].order())


def tuned(results: Results, settings: Sequence[Contender], metric: str) -> dict[Chosen, dict[int, float]]:
    """Validation metric of what tuning tried of some settings, by seed; rates ascend, failed trials are missing."""
    found: dict[Chosen, dict[int, float]] = defaultdict(dict)
    ours = {t: r for t, r in results.items() if t.stage == "tune" and t.contender in settings}
    for trial, result in sorted(ours.items(), key=lambda item: (settings.index(item[0].contender), *item[0][2:])):
        if metric in result.get("after", ()):
            found[Chosen(trial.contender, trial.lr)][trial.seed] = result["after"][metric]
    return dict(found)


def over_rates(results: Results, setting: Contender, metric: str) -> dict[float, list[float]]:
    """Validation metric over learning rate, one value per tuning seed; failed trials are missing."""
    return {choice.lr: list(of.values()) for choice, of in tuned(results, [setting], metric).items()}


def ranked(results: Results, settings: Sequence[Contender], by: Literal["nll"] | None = None) -> list[Chosen]:
    """Settings and rates by their mean validation metric, the best first, of equals the one with the lower nll.

    Only those that ended on the most tuning seeds take part: a mean says nothing of the seeds that it lacks. The metric
    is the one that decides the comparison, unless ``by`` says that the likelihood chooses.
    """
    metric, higher = (by, False) if by else primary(results)
    sign = 1 if higher else -1
    found = tuned(results, settings, metric)
    most = max(map(len, found.values()), default=0)
    quality = {choice: sign * mean(of.values()) for choice, of in found.items() if len(of) == most}
    nll = {choice: mean(of.values()) for choice, of in tuned(results, settings, "nll").items()}
    return sorted(quality, key=lambda choice: (quality[choice], -nll.get(choice, 0.0)), reverse=True)


def choose_setting(results: Results, settings: Sequence[Contender], by: Literal["nll"] | None = None) -> Chosen | None:
    """The first of :func:`ranked`; None where all failed."""
    return next(iter(ranked(results, settings, by)), None)


def chosen_settings(results: Results, comparison: Comparison) -> dict[Contender, Chosen]:
    """What every contender's final runs take: the fixed rate, else the best tuned; without those that failed."""
    if comparison.fixed is not None:
        fixed = comparison.fixed
        return {c: Chosen(comparison.settings[c][0], fixed[c]) for c in comparison.contenders if c in fixed}
    found = {c: choose_setting(results, comparison.settings[c], comparison.chosen_by) for c in comparison.contenders}
    return {contender: choice for contender, choice in found.items() if choice is not None}


def final_runs(results: Results, choice: Chosen | None) -> dict[int, Mapping[str, Any]]:
    """What the final runs at a choice left, by seed."""
    return {
        trial.seed: result
        for trial, result in sorted(results.items(), key=lambda item: item[0].seed)
        if trial.stage == "final" and (trial.contender, trial.lr) == choice and "error" not in result
    }


def relative_range(
    ours: Iterable[Mapping[str, Any]], base: Iterable[Mapping[str, Any]], key: str
) -> tuple[float, float] | None:
    """Least and greatest of some runs' seconds or bytes, each over the others' median on the same hardware."""
    mine, theirs = _by_hardware(ours, key), _by_hardware(base, key)
    ratios = [value / median(theirs[where]) for where in mine.keys() & theirs.keys() for value in mine[where]]
    return (min(ratios), max(ratios)) if ratios else None


def relative_cost(ours: Iterable[Mapping[str, Any]], base: Iterable[Mapping[str, Any]], key: str) -> float | None:
    """Median of some runs' seconds or bytes over that of others on the same hardware; None where they never met.

    A comparison may go on with another machine, whose times say nothing beside the first one's. Where both ran on
    several, the mean of the ratios.
    """
    mine, theirs = _by_hardware(ours, key), _by_hardware(base, key)
    ratios = [median(mine[where]) / median(theirs[where]) for where in mine.keys() & theirs.keys()]
    return mean(ratios) if ratios else None


def _by_hardware(runs: Iterable[Mapping[str, Any]], key: str) -> dict[tuple[Any, ...], list[float]]:
    found: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for run in runs:
        found[hardware(run)].append(run[key])
    return found


def hardware(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a run's seconds and bytes depend on; runs on unlike hardware are not held against each other."""
    return tuple(run["environment"][part] for part in ("processor", "threads", "gpu"))


def summarize(values: Sequence[float]) -> Mean:
    """Mean and standard error; raises ValueError for no values."""
    if not values:
        raise ValueError("no values to summarize")
    error = stdev(values) / sqrt(len(values)) if len(values) > 1 else float("nan")
    return Mean(mean(values), error, len(values))


def paired_difference(
    ours: Mapping[int, float], baseline: Mapping[int, float], *, higher_is_better: bool
) -> Difference | None:
    """Paired over common seeds; None without any."""
    sign = 1 if higher_is_better else -1
    gains = [sign * (ours[seed] - baseline[seed]) for seed in sorted(ours.keys() & baseline.keys())]
    if not gains:
        return None
    half = float("inf")
    if len(gains) > 1:
        half = float(stats.t.ppf(0.975, len(gains) - 1)) * summarize(gains).error
    value, error = mean(gains), summarize(gains).error
    return Difference(value, error, value - half, value + half, sum(gain > 0 for gain in gains), len(gains))
