"""Which tuning trials are given up: those far behind the best finished one of their contender, at the same point.

A setting that several contenders have is given up only for what all of them have: each chooses among its own.

The measure is the training loss, which every trial logs. What counts is how far a trial is behind, as a share of what
the best one had gained by then. The shares were set by a replay over recorded trials
(``python -m benchmarks.studies.pruning``, docs/compare.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..runs.giving_up import Bar, level
from .contender import Contender
from .plan import Comparison, Trial
from .statistics import Results

# Share of a run → how far behind the best a trial may be there, as a share of what the best has gained.
MARGINS = {1 / 5: 0.5, 1 / 3: 0.15, 2 / 3: 0.1}


def bars(comparison: Comparison, results: Results, trial: Trial, margins: Mapping[float, float] = MARGINS) -> list[Bar]:
    """What a tuning trial must reach to go on; nothing where no trial of its contender and seed has finished."""
    if trial.stage != "tune":
        return []
    having = [set(settings) for settings in comparison.settings.values() if trial.contender in settings]
    rivals = set[Contender]().union(*having[:1]).intersection(*having)
    finished = [
        result
        for other, result in results.items()
        if other.stage == "tune" and other.seed == trial.seed and other.contender in rivals and "after" in result
    ]
    if not finished:
        return []
    best = max(finished, key=_score)
    return [Bar(share, loss) for share, margin in margins.items() if (loss := _bar(best, share, margin)) is not None]


def given_up_sentence(results: Results) -> str | None:
    """How many tuning trials were given up, and how many steps that saved; None where none was."""
    ends = [result["given_up"] for result in results.values() if "given_up" in result]
    if not ends:
        return None
    tuned = [result for trial, result in results.items() if trial.stage == "tune" and "error" not in result]
    steps = sum(result["given_up"]["of"] if "given_up" in result else result["steps"] for result in tuned)
    saved = sum(end["of"] - end["step"] for end in ends)
    return (
        f"{len(ends)} of {len(tuned)} tuning trials were given up, far behind another setting of their method, which "
        f"saved {saved / steps:.0%} of the steps. They have no validation score (--no-prune runs them)."
    )


def _score(result: Mapping[str, Any]) -> float:
    value = result["after"][result["primary"]]
    return value if result["higher_is_better"] else -value


def _bar(best: Mapping[str, Any], share: float, margin: float) -> float | None:
    """The loss that is just not too far behind; None where the best one itself had gained nothing by then."""
    losses = best.get("losses") or []
    reached = level(losses, best["steps"], share)
    gained = 0.0 if reached is None else losses[0][1] - reached
    return reached + margin * gained if reached is not None and gained > 0 else None
