"""What giving up would have saved, and whether the same setting would have been chosen: recorded comparisons again.

    python -m benchmarks.studies.pruning FOLDER…

Each FOLDER holds a comparison whose tuning trials ran to their end. Each contender and tuning seed is one case, its
trials taken in the order in which a single worker would take them. Writes OUTPUT/pruning.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from rich.console import Console

from scalora.arena.plan import Trial
from scalora.arena.pruning import MARGINS, bars
from scalora.arena.results import ComparisonRecord, read_comparison
from scalora.arena.statistics import choose_setting
from scalora.runs.giving_up import level

from .. import record


class Case(NamedTuple):
    """One contender at one tuning seed."""

    contender: str
    trials: int
    given_up: int
    saved: float  # share of the steps
    same: bool  # the same setting and rate are chosen
    loss: float  # how much worse the chosen one's validation metric is


def replay(found: ComparisonRecord, margins: Mapping[float, float] = MARGINS) -> list[Case]:
    """Every case of a comparison whose trials have their curves."""
    comparison, cases = found.comparison, []
    known = [t for t in comparison.tuning() if (r := found.results.get(t)) and (r.get("losses") or "error" in r)]
    for contender, seed in product(comparison.everyone, comparison.tuning_seeds):
        settings = comparison.settings[contender]
        whole = {t: found.results[t] for t in known if t.contender in settings and t.seed == seed}
        kept: dict[Trial, Any] = {}
        taken = total = 0.0
        for trial, result in whole.items():
            steps = result.get("steps", 0)  # a failed trial has none
            share = 1.0 if "error" in result else _ends_at(result, bars(comparison, kept, trial, margins))
            taken, total = taken + share * steps, total + steps
            if share == 1:
                kept[trial] = result
        best, ours = choose_setting(whole, settings), choose_setting(kept, settings)
        if best is None or ours is None or len(whole) < 2:
            continue
        loss = abs(_score(whole, best) - _score(whole, ours))
        cases.append(Case(str(contender), len(whole), len(whole) - len(kept), 1 - taken / total, best == ours, loss))
    return cases


def _ends_at(result: Mapping[str, Any], required: Any) -> float:
    """The share of its steps after which a trial is given up; 1 where it is not."""
    for share, bar in sorted(required):
        reached = level(result["losses"], result["steps"], share)
        if reached is not None and not reached <= bar:
            return share
    return 1.0


def _score(results: Any, choice: Any) -> float:
    found = [r["after"][r["primary"]] for t, r in results.items() if (t.contender, t.lr) == choice]
    return mean(found)


def main() -> None:
    parser = record.parser(__doc__, "")
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    options = parser.parse_args()
    found = {str(folder): replay(read_comparison(folder)) for folder in options.folders}
    cases = [case for each in found.values() for case in each]
    if not cases:
        parser.error("no tuning trial there has a learning curve: run the comparison again with --no-prune")
    summary = {
        "cases": len(cases),
        "trials": sum(case.trials for case in cases),
        "saved": sum(case.saved * case.trials for case in cases) / sum(case.trials for case in cases),
        "same": mean(case.same for case in cases),
    }
    Console().print(summary, *(case for case in cases if not case.same))
    content = {
        **summary,
        "margins": list(MARGINS.items()),
        "folders": {k: [c._asdict() for c in v] for k, v in found.items()},
    }
    record.write(options.output / "pruning.json", content)


if __name__ == "__main__":
    main()
