"""Who is ahead, who cannot be told apart, and what to take: from the rows of a comparison's table."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Literal, NamedTuple

from .contender import Contender
from .statistics import ENOUGH_SEEDS, paired_difference
from .table import ComparisonTable, ContenderRow, TextTable

CostKind = Literal["time", "memory", "disk"]
COSTS: dict[CostKind, str] = {"time": "seconds per step", "memory": "peak memory", "disk": "bytes of what is saved"}
_NEAR = 1.05  # times the least cost: as good as it
_SIGNS = 5  # seeds that all say the same: 1 in 32 by chance, whatever their spread
RULE = (
    "The rule: of the methods that are not behind the best, by more than noise or in each of {signs} seeds or more, "
    "those whose mean is not worse than {baseline}'s are left; of these those that are not slower than the fastest, by "
    "more than 5 % and in every run; of these those within 5 % of the least peak memory, and then of the least held. "
    "Of what is left {baseline} is taken, if it is there, and else the best mean."
)


class Place(NamedTuple):
    """Where a contender stands."""

    row: ContenderRow
    place: int  # one more than there are contenders that are better by more than noise
    beaten: tuple[Contender, ...]  # those that it is better than by more than noise, the best first


def ranking(table: ComparisonTable) -> list[Place]:
    """Every contender, by place and then by mean. Differences are paired over seeds, at 95 %, one at a time."""
    rows = table.best_first().rows
    places = []
    for row in rows:
        beaten = tuple(other.contender for other in rows if _behind(table, other, row))
        ahead = sum(_behind(table, row, other) for other in rows)
        places.append(Place(row, ahead + 1, beaten))
    return sorted(places, key=lambda place: place.place)


def ranking_table(table: ComparisonTable) -> TextTable:
    """The ranking as text."""
    shown = {row[0]: row[1] for row in table.text("contender", "quality").rows}
    rows = [
        [str(place), str(row.contender), shown[str(row.contender)], ", ".join(map(str, beaten))]
        for row, place, beaten in ranking(table)
    ]
    return TextTable("", ["place", "method", f"test {table.metric}", "better, by more than noise, than"], rows)


def frontier(table: ComparisonTable, cost: CostKind) -> list[ContenderRow]:
    """Those than which no other is both at least as good and at least as cheap, by means; the cheapest first."""
    known = [row for row in table.rows if getattr(row, cost) is not None]
    sign = 1 if table.higher_is_better else -1
    front: list[ContenderRow] = []
    for row in sorted(known, key=lambda row: (getattr(row, cost), -sign * row.quality.value)):
        if not front or sign * row.quality.value > sign * front[-1].quality.value:
            front.append(row)
    return front


def recommendation(table: ComparisonTable) -> str:
    """What to take, and by which rule; or why nothing can be recommended."""
    rows = table.best_first().rows
    if not rows:
        return "Nothing can be recommended yet: no method has finished a final run."
    few = [row for row in rows if row.quality.n < ENOUGH_SEEDS]
    if len(few) < len(rows) and table.baseline not in [row.contender for row in few]:  # it must not stop the others
        rows = [row for row in rows if row not in few]
    first, common = rows[0], set(rows[0].scores).intersection(*(row.scores for row in rows))
    if len(common) < ENOUGH_SEEDS:
        leads = f" The best mean is {first.contender}'s, {first.quality.value:.4f}." if len(rows) > 1 else ""
        return f"Nothing can be recommended: {_few(min(row.quality.n for row in rows), len(common))}.{leads}"
    # Means over unlike seeds do not say who leads; who leads on all may be behind another on the seeds of both.
    rows.sort(key=lambda row: mean(row.scores[seed] for seed in common), reverse=table.higher_is_better)
    best = next((row for row in rows if not any(_behind(table, row, other) for other in rows)), rows[0])
    level = [row for row in rows if not _behind(table, row, best) and not _trails(table, row, best)]
    base = next((row for row in rows if row.contender == table.baseline), None)
    # None whose mean is below the baseline's: a few bad seeds make a mean that tells nothing.
    pool = level if base is None else [row for row in level if row in (best, base) or _gains(table, row, base)]
    known = [row for row in pool if row.time is not None and row.memory is not None]
    left = _cheapest(known) if known else pool
    taken = base if base in left and base is not None else best if best in left else left[0]
    said = [f"Take {taken.contender}: test {table.metric} {taken.quality.value:.4f}{_cost(table, taken)}."]
    ahead = [row for row in rows if _behind(table, taken, row)]  # level with the best is not level with all
    alike = [row for row in rows if row is not taken and row not in ahead and not _behind(table, row, taken)]
    for words, others in (("It cannot be told apart from", alike), ("Better by more than noise:", ahead)):
        said += [f"{words} {', '.join(str(row.contender) for row in others)}."] if others else []
    said += [] if alike or ahead else ["It is better than all others by more than noise."]
    if best is not taken:
        said.append(f"The best mean is {best.contender}'s, {best.quality.value:.4f}.")
    if few:
        named = ", ".join(str(row.contender) for row in few)
        said.append(f"Left out, since fewer than {ENOUGH_SEEDS} seeds have finished: {named}.")
    said.append(RULE.format(baseline=table.baseline, signs=_SIGNS))
    if any(row.shared for row in known):
        said.append("Others used the machine while these were timed, so that times did not count.")
    if unknown := [str(row.contender) for row in pool if row not in known]:
        said.append(f"Not known on the same hardware is what these cost: {', '.join(unknown)}.")
    if best is not first:
        mean_of = f"The mean of {first.contender}, {first.quality.value:.4f}"
        said.append(f"{mean_of}, is of other seeds: on common ones it is not ahead.")
    return " ".join(said)


def _few(least: int, common: int) -> str:
    """That there are not enough seeds: each method has `least` at least, and all have `common`."""
    if least > common:
        return f"the methods have {common or 'no'} seed{'s' * (common > 1)} in common (--seeds, or --retry)"
    few = "one seed says nothing" if least == 1 else f"{least} seeds say too little"
    return f"{few} about noise (--seeds {ENOUGH_SEEDS} or more)"


def _cost(table: ComparisonTable, row: ContenderRow) -> str:
    if row.time is None or row.memory is None:
        return ""
    shared = " (on a machine that others used)" if row.shared else ""
    said = f", at {row.time:.2f} of {table.baseline}'s time a step{shared} and {row.memory:.2f} of its peak memory"
    base = next((each for each in table.rows if each.contender == table.baseline), None)
    if base is not None and base.held and row.held is not None:
        said += f", with {row.held / base.held:.2f} of what it holds"
    return said


def _cheapest(rows: Sequence[ContenderRow]) -> list[ContenderRow]:
    """Those that no other is surely faster than, and then within 5 % of the least memory: peak, and what is held."""
    left = list(rows)
    if not any(row.shared for row in rows):
        left = [row for row in rows if not any(_slower(row, other) for other in rows)]
    for cost in ("memory", "held"):
        known = [value for row in left if (value := getattr(row, cost)) is not None]
        if len(known) == len(left):
            left = [row for row in left if getattr(row, cost) <= _NEAR * min(known)]
    return left


def _slower(row: ContenderRow, other: ContenderRow) -> bool:
    """Whether each of the one's runs took longer than all of the other's, and by 5 %; on enough seeds."""
    if row.times is None or other.times is None or min(row.quality.n, other.quality.n) < ENOUGH_SEEDS:
        return False
    return row.times[0] > _NEAR * other.times[1]


def _gains(table: ComparisonTable, row: ContenderRow, base: ContenderRow) -> bool:
    """Whether its mean is no worse than the other's, over the seeds of both."""
    found = paired_difference(row.scores, base.scores, higher_is_better=table.higher_is_better)
    return found is not None and found.value >= 0


def _trails(table: ComparisonTable, row: ContenderRow, other: ContenderRow) -> bool:
    """Whether the other is better in each of many seeds: one wild seed makes a spread that noise alone would have."""
    sign = 1 if table.higher_is_better else -1
    gains = [sign * (other.scores[seed] - row.scores[seed]) for seed in row.scores.keys() & other.scores.keys()]
    return len(gains) >= _SIGNS and min(gains) > 0


def _behind(table: ComparisonTable, row: ContenderRow, other: ContenderRow) -> bool:
    """Whether the other is better by more than noise."""
    found = paired_difference(row.scores, other.scores, higher_is_better=table.higher_is_better)
    return row is not other and found is not None and found.verdict == "worse"
