"""More tuning seeds for the settings in front: one seed alone may choose a rate at which others diverge."""

from __future__ import annotations

from collections.abc import Sequence

from .plan import Comparison, Trial
from .statistics import Results, ranked

LEADERS = 2  # so many settings of a contender are looked at again


def confirmation(comparison: Comparison, results: Results, tuning: Sequence[Trial], seeds: int) -> list[Trial]:
    """The tuning trials of the leading settings on so many further seeds, the done ones among them.

    Leaders are those on the first tuning seeds, once a contender's trials of `tuning` are done: those of the grid and
    of what extends it. Of a single setting nothing is to be chosen.
    """
    if comparison.fixed is not None or seeds < 1:
        return []
    last = max(comparison.tuning_seeds)
    further = range(last + 1, last + 1 + seeds)
    found: dict[Trial, None] = {}
    for contender in comparison.contenders:
        settings = comparison.settings[contender]
        own = [trial for trial in tuning if trial.contender in settings]
        again = (trial for trial in results if trial.stage == "tune" and trial.seed in further)
        found |= dict.fromkeys(trial for trial in again if trial.contender in settings)
        if any(trial not in results for trial in own):
            continue
        leaders = ranked({trial: results[trial] for trial in own}, settings, comparison.chosen_by)[:LEADERS]
        if len(leaders) > 1:
            found |= dict.fromkeys(Trial("tune", *leader, seed) for leader in leaders for seed in further)
    return list(found)
