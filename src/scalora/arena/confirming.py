"""More tuning seeds for the settings in front: one seed alone may choose a rate at which others diverge."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from .plan import Comparison, Trial
from .statistics import Results, ranked

LEADERS = 2  # so many settings of a contender are looked at again


def confirmation(comparison: Comparison, results: Results, tuning: Sequence[Trial], seeds: int) -> list[Trial]:
    """The tuning trials of the leading settings on so many further seeds, the done ones among them.

    Leaders are those on the first tuning seeds, once a contender's trials of `tuning` are done: those of the grid and
    of what extends it. Where none of them ends on all seeds the next ones are looked at: else the first would be chosen
    on its one seed, though it diverges on others. Of a single setting nothing is to be chosen.
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
        order = ranked({trial: results[trial] for trial in own}, settings, comparison.chosen_by)
        for place in range(0, len(order) if len(order) > 1 else 0, LEADERS):
            each = [[Trial("tune", *leader, seed) for seed in further] for leader in order[place : place + LEADERS]]
            found |= dict.fromkeys(chain.from_iterable(each))
            waiting = any(trial not in results for trials in each for trial in trials)
            if waiting or any(all("after" in results[trial] for trial in trials) for trials in each):
                break
    return list(found)
