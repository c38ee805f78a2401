"""Who is ahead, who cannot be told apart, and what to take: from the rows of a comparison's table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from .contender import Contender
from .statistics import paired_difference
from .table import ComparisonTable, ContenderRow, TextTable

CostKind = Literal["time", "memory", "disk"]
COSTS: dict[CostKind, str] = {"time": "seconds per step", "memory": "peak memory", "disk": "bytes of what is saved"}
_NEAR = 1.05  # times the least cost: as good as it
RULE = (
    "The rule: of the methods that cannot be told apart from the best, those within 5 % of the fastest step are left, "
    "of these those within 5 % of the least peak memory, and of these the one with the best mean is taken."
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
    if min(row.quality.n for row in rows) < 2:
        return "Nothing can be recommended: one seed says nothing about noise (--seeds gives more)."
    best = rows[0]
    level = [row for row in rows if not _behind(table, row, best)]
    timed = [row for row in level if row.time is not None and row.memory is not None]
    taken = _cheapest(timed)[0] if timed else best
    said = [f"Take {taken.contender}: test {table.metric} {taken.quality.value:.4f}{_cost(table, taken)}."]
    others = [str(row.contender) for row in level if row is not taken]
    ties = f"It cannot be told apart from {', '.join(others)}."
    said.append(ties if others else "It is better than all others by more than noise.")
    if best is not taken:
        said.append(f"The best mean is {best.contender}'s, {best.quality.value:.4f}.")
    said.append(RULE)
    if unknown := [str(row.contender) for row in level if row not in timed]:
        said.append(f"Not known on the same hardware is what these cost: {', '.join(unknown)}.")
    return " ".join(said)


def _cost(table: ComparisonTable, row: ContenderRow) -> str:
    if row.time is None or row.memory is None:
        return ""
    return f", at {row.time:.2f} of {table.baseline}'s time a step and {row.memory:.2f} of its peak memory"


def _cheapest(rows: Sequence[ContenderRow]) -> list[ContenderRow]:
    for cost in ("time", "memory"):
        least = min(getattr(row, cost) for row in rows)
        rows = [row for row in rows if getattr(row, cost) <= _NEAR * least]
    return list(rows)


def _behind(table: ComparisonTable, row: ContenderRow, other: ContenderRow) -> bool:
    """Whether the other is better by more than noise."""
    found = paired_difference(row.scores, other.scores, higher_is_better=table.higher_is_better)
    return row is not other and found is not None and found.verdict == "worse"
