"""Whether rank matters on a ground: full fine-tuning's gain on LoRA, LoRA's curve over rank, and what is missing."""

import dataclasses

import pytest

from helpers import comparisons
from scalora.arena.admission import admission
from scalora.arena.contender import Contender
from scalora.arena.plan import Trial

LORA, FULL = Contender("lora", 2), Contender("full", 2)
RANKS = (1, 2, 4)
STEEP, FLAT = (0.5, 0.6, 0.7), (0.5, 0.5, 0.5)


def _ground(folder, *, gap=(0.3, 0.31, 0.29), curve=STEEP, spread=(0.0, 0.001, -0.001), higher=True):
    """Full beats LoRA by `gap` on each seed; LoRA's curve, with what each tuning seed adds (rank by rank in turn)."""
    curve_of = tuple(Contender("lora", rank) for rank in RANKS)
    sign = 1 if higher else -1

    def result(value):
        return {"after": {"score": sign * value, "nll": 1.0}, "primary": "score", "higher_is_better": higher}

    comparison = dataclasses.replace(
        comparisons.small(folder), contenders=(LORA, FULL), rates=(1e-4, 1e-3, 1e-2), curve=curve_of,
        seeds=tuple(range(len(gap))), tuning_seeds=tuple(range(len(spread))),
    )  # fmt: skip
    results = {
        Trial("tune", each, rate, seed): result(0.1)
        for each in (FULL, *curve_of) for rate in (1e-4, 1e-2) for seed in comparison.tuning_seeds
    }  # fmt: skip
    results |= {Trial("tune", FULL, 1e-3, seed): result(0.9) for seed in comparison.tuning_seeds}
    for place, contender in enumerate(curve_of):
        for seed, extra in enumerate(spread):
            results[Trial("tune", contender, 1e-3, seed)] = result(curve[place] + extra * (-1) ** place)
    for seed, gain in enumerate(gap):
        results[Trial("final", LORA, 1e-3, seed)] = result(0.6 + 0.1 * seed)
        results[Trial("final", FULL, 1e-3, seed)] = result(0.6 + 0.1 * seed + gain)
    return comparison, results


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize(
    ("change", "matters", "words"),
    [
        ({}, True, ["rank matters here: full@2 is 0.3000 better than lora@2", "52.0 standard errors", "0.2000"]),
        ({"gap": (0.3, 0.3, 0.3)}, True, ["alike on every seed (5 are needed)"]),
        ({"gap": (0.1, 0.3, 0.2)}, False, ["rank does not matter here: ", "3.5 standard errors (5 are needed)"]),
        ({"gap": (0.0, 0.0, 0.0)}, False, ["full@2 is neither better nor worse than lora@2"]),
        ({"gap": (-0.3, -0.31, -0.29)}, False, ["full@2 is 0.3000 worse than lora@2"]),
        ({"curve": (0.5, 0.45, 0.7)}, False, ["but from 1 to 2 it is 0.0500 worse"]),
        ({"curve": (0.5, 0.499, 0.7)}, True, ["no step is worse by as many"]),  # within what seeds do
        ({"curve": FLAT}, False, ["is neither better nor worse", "(2 are needed)"]),
        ({"curve": FLAT, "spread": (0.0, 0.0)}, False, ["alike on every seed"]),
        ({"curve": (0.5, 0.5, 0.6), "spread": (0.0, 0.0)}, True, ["no step is worse"]),
        ({"gap": (0.3,)}, None, ["is not known", "one seed cannot tell that from noise (--seeds 5)"]),
        ({"spread": (0.0,)}, True, ["rank matters here", "0.2000 better, and no step is worse"]),
        ({"spread": (0.0,), "curve": (0.5, 0.7, 0.69)}, None, ["one tuning seed cannot tell", "--tuning-seeds 3"]),
        ({"spread": (0.0,), "curve": FLAT}, None, ["one tuning seed cannot tell"]),
        ({"gap": (0.0, 0.1, 0.0), "spread": (0.0,), "curve": FLAT}, False, ["rank does not matter here"]),
        ({"gap": (0.0, 0.1)}, None, ["is not known", "2 seeds cannot tell that from noise (--seeds 5)"]),
        ({"gap": (0.0, 0.1), "curve": FLAT}, None, ["is not known"]),
    ],
)  # fmt: skip
def test_a_ground_is_judged_by_both_conditions(tmp_path, change, matters, words, higher):
    found = admission(*_ground(tmp_path, **change, higher=higher))
    assert found.rank_matters is matters
    assert all(each in found.sentence for each in words), found.sentence


def test_what_is_missing_is_said_with_the_option_that_runs_it(tmp_path):
    comparison, results = _ground(tmp_path)
    alone = dataclasses.replace(comparison, contenders=(LORA,), curve=())
    found = admission(alone, results)
    assert found.rank_matters is None
    assert "full was not run (add full to --methods)" in found.sentence
    assert "curve over rank was not run (leave --no-curve out)" in found.sentence
    assert not found.points
    strangers = admission(dataclasses.replace(comparison, contenders=(Contender("hira", 2),)), results)
    assert "lora@2 and full was not run (add lora@2,full to --methods)" in strangers.sentence
    begun = {trial: result for trial, result in results.items() if trial.stage == "tune" and trial.contender.rank < 4}
    assert "have no final run on a common seed" in admission(comparison, begun).sentence
    assert "LoRA's curve over rank is not complete" in admission(comparison, begun).sentence
    assert admission(comparison, {}).rank_matters is None


def test_one_condition_that_fails_is_enough_where_the_other_was_looked_at(tmp_path):
    comparison, results = _ground(tmp_path, gap=(0.0, 0.1, -0.1))
    assert admission(comparison, results).rank_matters is False
    found = admission(dataclasses.replace(comparison, curve=()), results)
    assert found.rank_matters is None
    assert "leave --no-curve out" in found.sentence
    comparison, results = _ground(tmp_path, curve=FLAT)
    assert admission(comparison, results).rank_matters is False
    assert admission(dataclasses.replace(comparison, contenders=(LORA,)), results).rank_matters is None


@pytest.mark.parametrize(("gap", "behind"), [((0.0, 0.1, -0.1), FULL), ((0.3, 0.31, 0.29), LORA)])
def test_a_gap_is_not_known_where_the_one_behind_chose_the_last_rate(tmp_path, gap, behind):
    comparison, results = _ground(tmp_path, gap=gap)
    narrow = {t: r for t, r in results.items() if not (t.contender == behind and t.lr == 1e-2)}
    found = admission(dataclasses.replace(comparison, curve=()), narrow).gap
    assert found.holds is None
    assert f"{behind}'s rate is the highest, 0.001, of those tried: a better one may lie beyond" in found.text


def test_a_rank_that_failed_is_left_out(tmp_path):
    comparison, results = _ground(tmp_path)
    results |= {t: {"error": "rank is too large"} for t in results if t.contender == Contender("lora", 4)}
    found = admission(comparison, results)
    assert list(found.points) == [1, 2]
    assert "from rank 1 to 2" in found.sentence
