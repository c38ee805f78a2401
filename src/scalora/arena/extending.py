"""Grids of rates that turn out too narrow: a method that chose the last rate tried gets the next one too."""

from __future__ import annotations

from .contender import Contender
from .plan import Chosen, Comparison, Trial
from .statistics import Results, choose_setting, chosen_settings

_SINGLE = 3.0  # from one rate to the next where the grid has only one


def extension(comparison: Comparison, results: Results, limit: int) -> list[Trial]:
    """The tuning trials beyond the grid that are to be had, those that are done among them.

    A contender whose tuning is complete, and which chose the lowest or highest rate tried at that setting, is tried at
    the next one, in the ratio of the grid's last two. That goes on for `limit` rates on either side at most.
    """
    if comparison.fixed is not None or limit < 1:
        return []
    planned = comparison.tuning()
    unfinished = {trial.contender for trial in planned if trial not in results}
    found: dict[Trial, None] = {}
    for contender in comparison.everyone:
        settings = comparison.settings[contender]
        if not unfinished.isdisjoint(settings):
            continue
        tried = {
            trial._replace(seed=seed): None
            for trial in beyond(comparison, results, contender)
            for seed in comparison.tuning_seeds
        }
        choice = choose_setting(results, settings, comparison.chosen_by)
        complete = all(trial in results for trial in tried)  # else a rate would be judged by one seed of several
        if complete and choice is not None and (rate := next_rate(comparison, results, choice, limit)) is not None:
            tried |= dict.fromkeys(Trial("tune", choice.contender, rate, seed) for seed in comparison.tuning_seeds)
        found |= tried
    return list(found)


def beyond(comparison: Comparison, results: Results, contender: Contender) -> list[Trial]:
    """The tuning trials of a contender outside the grid that have a result."""
    settings, (low, high) = comparison.settings[contender], (min(comparison.rates), max(comparison.rates))
    tried = [trial for trial in results if trial.contender in settings and not low <= trial.lr <= high]
    return [trial for trial in tried if trial.stage == "tune" and trial.seed in comparison.tuning_seeds]


def next_rate(comparison: Comparison, results: Results, choice: Chosen, limit: int) -> float | None:
    """The rate to try after a choice; None where it is no edge, or the limit on that side is reached."""
    tried = sorted({t.lr for t in results if t.stage == "tune" and t.contender == choice.contender})
    grid = sorted(comparison.rates)
    if choice.lr == tried[-1] and sum(rate > grid[-1] for rate in tried) < limit:
        return _short(choice.lr * (grid[-1] / grid[-2] if len(grid) > 1 else _SINGLE))
    if choice.lr == tried[0] and sum(rate < grid[0] for rate in tried) < limit:
        return _short(choice.lr / (grid[1] / grid[0] if len(grid) > 1 else _SINGLE))
    return None


def edge(comparison: Comparison, results: Results, choice: Chosen) -> str | None:
    """Which edge of the rates tried a choice lies at, and its rate; None where it lies between, or was given."""
    if comparison.fixed is not None:
        return None
    tried = sorted({t.lr for t in results if t.stage == "tune" and t.contender == choice.contender})
    if choice.lr not in (tried[0], tried[-1]):
        return None
    return f"{'lowest' if choice.lr == tried[0] else 'highest'}, {choice.lr:g}"


def edge_sentence(comparison: Comparison, results: Results) -> str | None:
    """Who chose the lowest or highest rate tried, so that a better one may lie beyond; None where nobody did."""
    found = {c: edge(comparison, results, choice) for c, choice in chosen_settings(results, comparison).items()}
    said = [f"{contender} the {which}" for contender, which in found.items() if which]
    if not said:
        return None
    return (
        f"At the edge of the rates tried: {'; '.join(said)}. A better rate may lie beyond (--extend, or a wider --lr)."
    )


def _short(rate: float) -> float:
    """Four digits, so that a rate is the same however it was come by."""
    return float(f"{rate:.4g}")
