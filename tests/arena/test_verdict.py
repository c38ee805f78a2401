"""Ranking with ties, the Pareto front, and what a comparison recommends."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scalora.arena.contender import Contender
from scalora.arena.table import ComparisonTable, ContenderRow
from scalora.arena.verdict import _SIGNS, COSTS, RULE, frontier, ranking, ranking_table, recommendation

LORA = Contender("lora", 2)
NOISE = (0.0, 0.01, -0.01)  # over seeds; every other seed is the same for all


def _row(name, mean, time=1.0, memory=1.0, disk=10.0, seeds=3, shift=0, spread=0.01, waited=None, held=None):
    scores = {seed: mean + NOISE[(seed + shift) % 3] for seed in range(seeds)}
    times = None if time is None else (time - spread, time + spread)
    return ContenderRow(Contender(name, 2), {}, 1e-3, scores, None, 1, time, memory, held, disk, {}, times, waited)


def _table(*rows, higher=True):
    return ComparisonTable("accuracy" if higher else "nll", higher, LORA, (1e-3,), list(rows))


def test_those_that_cannot_be_told_apart_share_a_place():
    rows = _row("lora", 0.5), _row("good", 0.8), _row("level", 0.801, shift=1), _row("worst", 0.2)
    found = ranking(_table(*rows))
    assert [(str(p.row.contender), p.place) for p in found] == [
        ("level@2", 1), ("good@2", 1), ("lora@2", 3), ("worst@2", 4)
    ]  # fmt: skip
    assert found[1].beaten == (LORA, Contender("worst", 2))
    shown = ranking_table(_table(*rows))
    assert shown.columns[1:] == ["method", "test accuracy", "better, by more than noise, than"]
    assert shown.rows[2] == ["3", "lora@2", "0.5000 ± 0.0058", "worst@2"]
    turned = ranking(_table(*rows, higher=False))
    assert [p.place for p in turned] == [1, 2, 3, 3]


@given(
    st.lists(st.tuples(st.floats(0, 1), st.none() | st.floats(0.5, 2)), min_size=1, max_size=8),
    st.sampled_from(list(COSTS)),
    st.booleans(),
)
def test_the_front_is_what_nothing_dominates(points, cost, higher):
    rows = [_row(f"m{i}", value, **{cost: at}) for i, (value, at) in enumerate(points)]
    front = frontier(_table(*rows, higher=higher), cost)
    known = [row for row in rows if getattr(row, cost) is not None]
    sign = 1 if higher else -1

    def dominates(one, other):
        gains = (sign * (one.quality.value - other.quality.value), getattr(other, cost) - getattr(one, cost))
        return min(gains) >= 0 and max(gains) > 0

    best = [row for row in known if not any(dominates(other, row) for other in known)]
    assert {(row.quality.value, getattr(row, cost)) for row in front} == {
        (row.quality.value, getattr(row, cost)) for row in best
    }
    assert all(one.quality.value != two.quality.value for one, two in itertools.pairwise(front))


def test_of_those_level_with_the_best_the_cheapest_is_recommended():
    rows = _row("lora", 0.5), _row("best", 0.81, time=1.5), _row("cheap", 0.8, time=1.02, shift=1), _row("fast", 0.4)
    said = recommendation(_table(*rows))
    assert said.startswith("Take cheap@2: test accuracy 0.8000, at 1.02 of lora@2's time a step and 1.00 of its peak")
    assert "It cannot be told apart from best@2. The best mean is best@2's, 0.8100." in said
    assert RULE.format(baseline=LORA, signs=_SIGNS) in said
    memory = _row("best", 0.81, memory=1.5), _row("cheap", 0.8, shift=1), _row("unknown", 0.79, time=None, shift=1)
    said = recommendation(_table(*memory))
    assert said.startswith("Take cheap@2")
    assert said.endswith("Not known on the same hardware is what these cost: unknown@2.")


def test_a_mean_below_loras_that_one_bad_seed_made_is_not_taken_though_nothing_tells_it_from_the_best():
    wild = replace(_row("wild", 0.9, time=0.5), scores={0: 0.95, 1: 0.94, 2: 0.0})
    table = _table(_row("lora", 0.8), _row("good", 0.9), wild)
    assert recommendation(table).startswith("Take good@2: test accuracy 0.9000")
    assert "It cannot be told apart from wild@2." in recommendation(table)


def test_what_is_taken_is_told_apart_from_others_by_its_own_differences():
    steady, wild = replace(_row("steady", 0.8), scores={0: 0.80, 1: 0.81, 2: 0.80}), {0: 0.95, 1: 0.71, 2: 0.90}
    below = replace(_row("below", 0.7), scores={0: 0.79, 1: 0.80, 2: 0.79})  # only the wild one is level with it
    table = _table(replace(_row("best", 0.9, memory=2.0), scores=wild), steady, below)
    assert recommendation(table).startswith("Take steady@2")
    assert "It cannot be told apart from best@2." in recommendation(table)
    behind = replace(below, memory=0.5)
    table = _table(replace(_row("best", 0.9, memory=2.0), scores=wild), steady, behind)
    assert recommendation(table).startswith("Take below@2")
    assert "It cannot be told apart from best@2. Better by more than noise: steady@2." in recommendation(table)


def test_means_over_other_seeds_are_not_held_against_each_other():
    lucky = replace(_row("lucky", 0.9), scores={0: 0.90, 1: 0.91, 2: 0.92})  # its other seeds failed
    better = replace(_row("better", 0.9), scores={0: 0.93, 1: 0.95, 2: 0.96, 3: 0.5, 4: 0.5})
    table = _table(lucky, better)
    assert table.best_first().rows[0] is lucky
    assert [str(place.row.contender) for place in ranking(table)] == ["better@2", "lucky@2"]
    said = recommendation(table)
    assert said.startswith("Take better@2: ")
    assert "better than all others" in said
    assert said.endswith("The mean of lucky@2, 0.9100, is of other seeds: on common ones it is not ahead.")
    # Of better mean than LoRA, and worse on each seed that LoRA ran too; cheap, and too wild to be told apart.
    base = replace(_row("lora", 0.5), scores={0: 0.7, 1: 0.8, 2: 0.6, 3: 0.1, 4: 0.2})
    below = replace(_row("below", 0.5, time=0.4), scores={0: 0.69, 1: 0.2, 2: 0.59})
    assert recommendation(_table(base, below)).startswith("Take lora@2: ")
    apart = replace(lucky, scores=dict.fromkeys(range(2, 6), 0.9))
    assert "have 2 seeds in common" in recommendation(_table(_row("lora", 0.5, seeds=4), apart))
    assert "have no seed in common" in recommendation(
        _table(_row("lora", 0.5, seeds=3), replace(apart, scores={7: 1, 8: 1, 9: 1}))
    )


def test_a_contender_with_fewer_seeds_takes_no_evidence_from_others():
    scores = {0: 0.8, 1: 0.8, 2: 0.8, 3: 0.8}
    best, worse = replace(_row("best", 0.8), scores=scores), _row("worse", 0.7, time=0.4)
    worse = replace(worse, scores={0: 0.79, 1: 0.75, 2: 0.76, 3: 0.75})  # on three seeds it cannot be told apart
    said = recommendation(_table(best, worse, replace(_row("lora", 0.5), scores={0: 0.5, 1: 0.5, 2: 0.5})))
    assert said.startswith("Take best@2: ")
    assert "better than all others" in said


def test_what_is_behind_in_each_of_five_seeds_is_not_taken_however_wide_its_spread_is():
    best = replace(_row("best", 0.1, memory=1.5), scores={0: 0.1, 1: 0.1, 2: 0.1, 3: 0.1, 4: 0.1})
    wild = replace(_row("wild", 0.9), scores={0: 0.2, 1: 0.2, 2: 0.2, 3: 0.2, 4: 6.0})
    base = replace(_row("lora", 8.0), scores=dict.fromkeys(range(5), 8.0))
    said = recommendation(_table(base, best, wild, higher=False))
    assert said.startswith("Take best@2")
    assert "It cannot be told apart from wild@2" in said  # noise alone does not say so
    once = replace(wild, scores=wild.scores | {0: 0.09})
    assert recommendation(_table(base, best, once, higher=False)).startswith("Take wild@2")


def test_a_method_of_few_seeds_is_left_out_and_stops_no_other():
    rows = _row("lora", 0.5), _row("best", 0.8), _row("broken", 0.9, seeds=1)
    said = recommendation(_table(*rows))
    assert said.startswith("Take best@2")
    assert "Left out, since fewer than 3 seeds have finished: broken@2." in said
    assert "Nothing can be recommended" in recommendation(_table(_row("lora", 0.5, seeds=2), *rows[1:]))


def test_a_clear_winner_is_recommended_whatever_it_costs():
    said = recommendation(_table(_row("lora", 0.5), _row("best", 0.8, time=3.0)))
    assert said.startswith("Take best@2")
    assert "It is better than all others by more than noise." in said
    assert "at" not in recommendation(_table(_row("best", 0.8, time=None))).split(".")[1]


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ((), "no method has finished"),
        ((_row("lora", 0.5, seeds=1),), "one seed"),
        ((_row("lora", 0.5, seeds=2), _row("fast", 0.8, time=0.4, seeds=2)), "2 seeds say too little"),
    ],
)
def test_without_evidence_nothing_is_recommended(rows, reason):
    assert recommendation(_table(*rows)).startswith("Nothing can be recommended")
    assert reason in recommendation(_table(*rows))


@pytest.mark.parametrize(
    ("fast", "taken"),
    [
        ({"mean": 0.498}, "lora"),  # below LoRA's mean, within noise: its time counts for nothing
        ({"mean": 0.502}, "fast"),
        ({"mean": 0.502, "waited": 0.3}, "lora"),  # others had the machine
        ({"mean": 0.502, "waited": 0.01}, "fast"),
        ({"mean": 0.502, "spread": 0.7}, "lora"),  # one of its runs took as long as LoRA's
        ({"mean": 0.502, "time": 1.0}, "lora"),  # nothing speaks for it
        ({"mean": 0.502, "held": 90.0}, "lora"),
    ],
)
def test_what_cannot_be_told_apart_from_lora_is_taken_only_where_it_surely_costs_less(fast, taken):
    options = {"time": 0.4, "shift": 1, "held": 10.0, **fast}
    if options["held"] > 10.0:
        options["time"] = 1.0
    said = recommendation(_table(_row("lora", 0.5, held=10.0), _row("fast", **options)))
    assert said.startswith(f"Take {taken}@2: ")
    assert ("Others used the machine" in said) == (fast.get("waited") == 0.3)
    assert "of what it holds" in said


def test_of_equal_time_and_peak_memory_the_one_that_holds_less_is_taken():
    said = recommendation(_table(_row("wide", 0.801, held=90.0), _row("narrow", 0.8, held=10.0, shift=1)))
    assert said.startswith("Take narrow@2")
