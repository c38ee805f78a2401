"""From trials to statements: chosen rates, means and intervals, and whether a difference is more than noise."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import mean, median, stdev
from typing import Any, Literal

from scipy import stats

from .plan import Comparison, Contender, Trial

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
    first = next((r for r in results.values() if "error" not in r), None)
    return (first["primary"], first["higher_is_better"]) if first else ("nll", False)


def over_rates(results: Results, contender: Contender, metric: str) -> dict[float, list[float]]:
    """Validation metric over learning rate, one value per tuning seed; failed trials are missing."""
    found: dict[float, list[float]] = defaultdict(list)
    for trial, result in results.items():
        mine = trial.stage == "tune" and trial.contender == contender
        if mine and metric in result.get("after", ()):
            found[trial.lr].append(result["after"][metric])
    return dict(sorted(found.items()))


def choose_rate(results: Results, contender: Contender, by: Literal["nll"] | None = None) -> float | None:
    """The rate with the best mean validation metric, of equals the one with the lower nll; None where all failed.

    The metric is the one that decides the comparison, unless ``by`` says that the likelihood chooses.
    """
    metric, higher = (by, False) if by else primary(results)
    sign = 1 if higher else -1
    quality = {lr: sign * mean(values) for lr, values in over_rates(results, contender, metric).items()}
    nll = {lr: mean(values) for lr, values in over_rates(results, contender, "nll").items()}
    return max(quality, key=lambda lr: (quality[lr], -nll.get(lr, 0.0)), default=None)


def chosen_rates(results: Results, comparison: Comparison) -> dict[Contender, float]:
    """The rate of every contender's final runs: the fixed one, else the best tuned; without those that failed."""
    if comparison.fixed is not None:
        return dict(comparison.fixed)
    rates = {contender: choose_rate(results, contender, comparison.chosen_by) for contender in comparison.contenders}
    return {contender: rate for contender, rate in rates.items() if rate is not None}


def final_runs(results: Results, contender: Contender, lr: float | None) -> dict[int, Mapping[str, Any]]:
    """What the runs at the chosen rate left, by seed."""
    return {
        trial.seed: result
        for trial, result in sorted(results.items(), key=lambda item: item[0].seed)
        if trial.stage == "final" and trial.contender == contender and trial.lr == lr and "error" not in result
    }


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
        found[tuple(run["environment"][part] for part in ("processor", "threads", "gpu"))].append(run[key])
    return found


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
        half = float(stats.t.ppf(0.975, len(gains) - 1)) * stdev(gains) / sqrt(len(gains))
    return Difference(mean(gains), mean(gains) - half, mean(gains) + half, sum(gain > 0 for gain in gains), len(gains))


def curve_verdict(results: Results, curve: Sequence[Contender]) -> str:
    """Whether LoRA's best validation metric depends on its rank, in words."""
    metric, higher = primary(results)
    best: dict[int, Mean] = {}
    for contender in curve:
        lr = choose_rate(results, contender)
        if lr is not None:
            best[contender.rank] = summarize(over_rates(results, contender, metric)[lr])
    if len(best) < 2:
        return "LoRA's curve over rank was not measured."
    low, high = best[min(best)], best[max(best)]
    gain = (high.value - low.value) * (1 if higher else -1)
    noise = sqrt(low.error**2 + high.error**2)
    ranks = f"from rank {min(best)} to {max(best)} LoRA's best validation {metric} changes by {gain:+.4f}"
    if not isfinite(noise):
        return f"{ranks}; with one tuning seed that cannot be told from noise."
    if gain <= 2 * noise:
        flat = "so this task cannot separate these methods by rank"
        return f"The curve is flat: {ranks} (two standard errors: {2 * noise:.4f}), {flat}."
    return f"Rank matters here: {ranks} (two standard errors: {2 * noise:.4f})."
