"""How far a comparison has come: a row per contender, and how long the rest will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from .contender import Contender
from .plan import Comparison, Trial
from .statistics import Results, chosen_settings, final_runs, primary, summarize
from .table import TextTable


def progress_table(comparison: Comparison, stages: Mapping[Contender, Sequence[Trial]], results: Results) -> TextTable:
    """What is done of each contender's trials, what was chosen, and what the final runs have reached so far."""
    metric, _ = primary(results)
    chosen, rows = chosen_settings(results, comparison), []
    for contender, trials in stages.items():
        tuning = [trial for trial in trials if trial.stage == "tune"]
        final = final_runs(results, chosen.get(contender)) if contender in comparison.contenders else {}
        quality = summarize([run["after"][metric] for run in final.values()]) if final else None
        decided = contender in chosen and all(trial in results for trial in tuning)
        rows.append(
            [
                str(contender),
                f"{sum(trial in results for trial in tuning)}/{len(tuning)}",
                f"{chosen[contender].lr:g}" if decided else "",
                f"{len(final)}/{len(comparison.seeds)}" if contender in comparison.contenders else "",
                ""
                if quality is None
                else f"{quality.value:.4f}" + (f" ± {quality.error:.4f}" if quality.n > 1 else ""),
            ]
        )
    return TextTable("", ["method", "tuned", "lr", "final", f"test {metric}"], rows)


def seconds_left(
    comparison: Comparison, stages: Mapping[Contender, Sequence[Trial]], results: Results, workers: int
) -> float | None:
    """Until all trials are done, by how long those before took; None without any.

    Those before are the contender's own, else the method's at the nearest rank, else all. Final runs that are not known
    yet are counted too. What will be given up or added is not.
    """
    taken: dict[Contender, list[float]] = {contender: [] for contender in stages}
    for contender, trials in stages.items():
        taken[contender] += [seconds for trial in trials if (seconds := _seconds(results.get(trial))) is not None]
    everything = [seconds for found in taken.values() for seconds in found]
    if not everything:
        return None
    total = 0.0
    for contender, trials in stages.items():
        final = len(comparison.seeds) if contender in comparison.contenders else 0
        known = sum(trial.stage == "final" for trial in trials)
        missing = sum(trial not in results for trial in trials) + max(0, final - known)
        near = min(
            (other for other in taken if taken[other] and other.method == contender.method),
            key=lambda other: abs(other.rank - contender.rank),
            default=None,
        )
        total += missing * mean(taken[contender] or (taken[near] if near else everything))
    return total / max(1, workers)


def _seconds(result: Mapping[str, Any] | None) -> float | None:
    return None if result is None else result.get("wall_seconds")


def in_minutes(seconds: float) -> str:
    """A rough duration in words."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
