import math

import numpy as np
import pytest
from scipy import stats

from scalora.arena.contender import Contender
from scalora.arena.plan import Chosen, Trial
from scalora.arena.statistics import (
    choose_setting,
    final_runs,
    over_rates,
    paired_difference,
    relative_cost,
    summarize,
)

LORA, OTHER = Contender("lora", 4), Contender("scalora", 4)


def _result(**metrics):
    return {"after": metrics, "primary": "accuracy", "higher_is_better": True}


def test_the_rate_is_chosen_on_validation_only_and_ties_go_to_the_lower_nll():
    results = {
        Trial("tune", LORA, 1e-3, 0): _result(accuracy=0.7, nll=0.5),
        Trial("tune", LORA, 3e-3, 0): _result(accuracy=0.8, nll=0.6),
        Trial("tune", LORA, 1e-2, 0): _result(accuracy=0.8, nll=0.4),
        Trial("tune", LORA, 3e-2, 0): {"error": "diverged"},
        Trial("final", LORA, 1e-3, 0): _result(accuracy=0.99, nll=0.1),
    }
    assert choose_setting(results, [LORA]) == Chosen(LORA, 1e-2)
    assert choose_setting(results, [OTHER]) is None
    results[Trial("tune", LORA, 1e-3, 0)]["after"]["nll"] = 0.3
    assert choose_setting(results, [LORA], "nll") == Chosen(LORA, 1e-3)
    assert over_rates(results, LORA, "accuracy") == {1e-3: [0.7], 3e-3: [0.8], 1e-2: [0.8]}
    assert final_runs(results, Chosen(LORA, 1e-3))[0]["after"]["accuracy"] == 0.99
    assert final_runs(results, Chosen(LORA, 1e-2)) == {}


def test_paired_differences_are_those_of_a_paired_t_test():
    ours, base = np.array([0.8, 0.82, 0.79, 0.85]), np.array([0.78, 0.81, 0.8, 0.8])
    found = paired_difference(dict(enumerate(ours)), {**dict(enumerate(base)), 9: 0.1}, higher_is_better=True)
    expected = stats.ttest_rel(ours, base).confidence_interval(0.95)
    assert found.error == pytest.approx(stats.sem(ours - base))
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert found.value == pytest.approx((ours - base).mean())
    assert (found.wins, found.n, found.verdict) == (3, 4, "within noise")


@pytest.mark.parametrize(
    ("gains", "higher", "verdict"),
    [
        ((0.1, 0.2), True, "within noise"),
        ((0.1, 0.11, 0.1), True, "better"),
        ((0.1, 0.11, 0.1), False, "worse"),
        ((0.1,), True, "one seed says nothing about noise"),
    ],
)
def test_verdicts_in_words(gains, higher, verdict):
    nothing = dict.fromkeys(range(len(gains)), 0.0)
    assert paired_difference(dict(enumerate(gains)), nothing, higher_is_better=higher).verdict == verdict


def test_no_common_seed_and_no_values():
    assert paired_difference({0: 1.0}, {1: 1.0}, higher_is_better=True) is None
    with pytest.raises(ValueError, match="no values"):
        summarize([])
    assert math.isnan(summarize([1.0]).error)
    assert summarize([1.0, 3.0]).error == pytest.approx(1.0)


def _on(processor, seconds):
    return {"environment": {"processor": processor, "threads": 1, "gpu": None}, "seconds_per_step": seconds}


def test_times_are_compared_on_one_machine_only():
    lora = [_on("fast", 1.0), _on("fast", 1.0), _on("slow", 4.0)]
    assert relative_cost([_on("fast", 2.0)], lora, "seconds_per_step") == 2.0
    assert relative_cost([_on("slow", 4.0)], lora, "seconds_per_step") == 1.0
    assert relative_cost([_on("fast", 2.0), _on("slow", 4.0)], lora, "seconds_per_step") == 1.5
    assert relative_cost([_on("another", 2.0)], lora, "seconds_per_step") is None
