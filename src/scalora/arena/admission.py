"""Whether rank matters on this ground: where it does not, no method of a higher rank can show anything.

It does where full fine-tuning beats LoRA clearly, and LoRA itself gets better with its rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise

from .extending import edge
from .plan import Comparison
from .statistics import (
    ENOUGH_SEEDS,
    Difference,
    Mean,
    Results,
    choose_setting,
    chosen_settings,
    final_runs,
    paired_difference,
    primary,
    summarize,
    tuned,
)
from .table import lora_of

GAP_ERRORS = 5.0  # by how many standard errors full fine-tuning must beat LoRA
CURVE_ERRORS = 2.0  # by how many a step of LoRA's curve may seem worse, and the whole curve must be better


@dataclass(frozen=True)
class Clause:
    """One of the two conditions: whether it holds (None: not known), and a clause that says so with numbers."""

    holds: bool | None
    text: str
    measured: bool = True


@dataclass(frozen=True)
class Admission:
    """Both conditions, and LoRA's best validation metric over its rank, which the second looks at."""

    gap: Clause
    curve: Clause
    points: Mapping[int, Mean]

    @property
    def rank_matters(self) -> bool | None:
        """Whether both hold; None where that is not known.

        One that fails is enough for no, if the other was looked at: the gap on enough seeds, and not at a rate beyond
        which full fine-tuning may be better; the curve on any.
        """
        gap, curve = self.gap.holds, self.curve.holds
        if (gap is False and self.curve.measured) or (curve is False and gap is not None):
            return False
        return True if gap and curve else None

    @property
    def sentence(self) -> str:
        matters = self.rank_matters
        said = "rank matters here" if matters else "rank does not matter here"
        said = "whether rank matters here is not known" if matters is None else said
        return f"{said}: {self.gap.text}; {self.curve.text}."


def admission(comparison: Comparison, results: Results) -> Admission:
    """Judge a comparison's ground.

    The gap: full fine-tuning against LoRA at the recipe's rank, final runs at best settings, paired over seeds, must be
    an improvement of at least five standard errors. The curve: from each rank to the next, at each one's best setting,
    paired over tuning seeds, no step may be worse by more than two standard errors, and from the lowest rank to the
    highest it must be better by more than two. The gap is not known on fewer than three seeds, nor where the one that
    is behind chose the last rate tried. With one tuning seed noise is unknown: then no step may be worse at all.
    """
    gap, points = _gap(comparison, results), _points(comparison, results)
    curve = _curve(comparison, results, points)
    means = {rank: summarize(list(values.values())) for rank, values in points.items()}
    return Admission(gap or _missing_gap(comparison), curve or _missing_curve(comparison), means)


def _gap(comparison: Comparison, results: Results) -> Clause | None:
    metric, higher = primary(results)
    lora, full = lora_of(comparison), next((c for c in comparison.contenders if c.method == "full"), None)
    chosen = chosen_settings(results, comparison)
    if full is None or full not in chosen or lora not in chosen:
        return None
    ours, base = ({s: run["after"][metric] for s, run in final_runs(results, chosen[c]).items()} for c in (full, lora))
    found = paired_difference(ours, base, higher_is_better=higher)
    if found is None:
        return None
    text = f"{full} is {_amount(found)} than {lora} in test {metric}"
    if found.n < ENOUGH_SEEDS:
        seeds = "one seed" if found.n == 1 else f"{found.n} seeds"
        return Clause(None, f"{text}, and {seeds} cannot tell that from noise (--seeds 5)")
    holds = found.value > 0 and found.value >= GAP_ERRORS * found.error
    text = f"{text}, {_errors(found)} ({GAP_ERRORS:g} are needed)"
    behind = lora if holds else full  # a better rate of the one that is behind could turn it round
    if (which := edge(comparison, results, chosen[behind])) is not None:
        reason = f"{behind}'s rate is the {which}, of those tried: a better one may lie beyond"
        return Clause(None, f"{text}, but {reason} (--extend, or a wider --lr)")
    return Clause(holds, text)


def _points(comparison: Comparison, results: Results) -> dict[int, dict[int, float]]:
    """Rank → LoRA's validation metric by tuning seed, at its best setting; ranks ascend."""
    metric, _ = primary(results)
    points = {}
    for contender in sorted(comparison.curve, key=lambda c: c.rank):
        settings = comparison.settings[contender]
        best = choose_setting(results, settings, comparison.chosen_by)
        if best is not None:
            points[contender.rank] = tuned(results, settings, metric)[best]
    return points


def _curve(comparison: Comparison, results: Results, points: Mapping[int, Mapping[int, float]]) -> Clause | None:
    metric, higher = primary(results)
    ranks = list(points)
    pairs = [*pairwise(ranks), (min(ranks, default=0), max(ranks, default=0))]
    found = {
        (low, high): step
        for low, high in pairs
        if low < high and (step := paired_difference(points[high], points[low], higher_is_better=higher))
    }
    planned = {setting for contender in comparison.curve for setting in comparison.settings[contender]}
    waits = any(trial.contender in planned and trial not in results for trial in comparison.tuning())
    if waits or len(ranks) < 2 or len(found) < len(set(pairs)):  # a rank that failed is left out
        return None
    whole = found[pairs[-1]]
    text = f"from rank {ranks[0]} to {ranks[-1]} LoRA's best validation {metric} is {_amount(whole)}"
    noisy = min(step.n for step in found.values()) > 1
    if not noisy:
        holds = True if whole.value > 0 and all(step.value >= 0 for step in found.values()) else None
        told = "no step is worse" if holds else "one tuning seed cannot tell that from noise (--tuning-seeds 3)"
        return Clause(holds, f"{text}, and {told}")
    text = f"{text}, {_errors(whole)} ({CURVE_ERRORS:g} are needed)"
    for (low, high), step in found.items():
        if step.value < -CURVE_ERRORS * step.error:
            return Clause(False, f"{text}, but from {low} to {high} it is {_amount(step)}, {_errors(step)}")
    rises = whole.value > CURVE_ERRORS * whole.error
    return Clause(rises, f"{text}, and no step is worse by as many")


def _missing_gap(comparison: Comparison) -> Clause:
    lora = lora_of(comparison)
    absent = [] if lora in comparison.contenders else [str(lora)]
    absent += [] if any(c.method == "full" for c in comparison.contenders) else ["full"]
    if absent:
        return Clause(None, f"{' and '.join(absent)} was not run (add {','.join(absent)} to --methods)", False)
    return Clause(
        None, f"full and {lora} have no final run on a common seed (the same command goes on, or --retry)", False
    )


def _missing_curve(comparison: Comparison) -> Clause:
    if not comparison.curve:
        return Clause(None, "LoRA's curve over rank was not run (leave --no-curve out)", False)
    return Clause(None, "LoRA's curve over rank is not complete (the same command goes on with it, or --retry)", False)


def _amount(found: Difference) -> str:
    if found.value == 0:
        return "neither better nor worse"
    return f"{abs(found.value):.4f} {'better' if found.value > 0 else 'worse'}"


def _errors(found: Difference) -> str:
    if found.error <= 1e-9 * abs(found.value):  # but for rounding
        return "alike on every seed"
    return f"{abs(found.value) / found.error:.1f} standard errors"
