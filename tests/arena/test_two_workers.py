"""Two workers on one queue: every trial is run by one of them."""

import pytest

from helpers import comparisons
from scalora.arena.queue import TrialQueue


@pytest.fixture
def comparison(tmp_path):
    return comparisons.small(tmp_path)


def test_two_workers_share_the_trials(comparison, tmp_path):
    one, two = TrialQueue(tmp_path / "out", comparison), TrialQueue(tmp_path / "out", comparison)
    one.enqueue(comparison.tuning())
    two.enqueue(comparison.tuning())
    wanted = comparison.tuning()
    taken = [store.take(wanted) for store in (one, two, one, two, one, two)]
    assert set(taken) == set(wanted)
    assert one.take(wanted) is None
    one.finish(taken[0], comparisons.fake_result(comparison, taken[0]))
    assert two.results()[taken[0]]["primary"] == "accuracy"
    one.enqueue(wanted)  # running ones of a live worker stay taken
    assert two.take(wanted) is None


def test_what_two_workers_put_there_at_one_moment_runs_once(comparison, tmp_path):
    one, two = TrialQueue(tmp_path / "out", comparison), TrialQueue(tmp_path / "out", comparison)
    wanted = comparison.tuning()[:2]
    for each in wanted:  # neither has seen what the other put there
        for _ in range(2):
            one.study.enqueue_trial(
                {}, user_attrs={"trial": [each.stage, str(each.contender), each.lr, each.seed], "ends": 0}
            )
    assert one.take(wanted) == wanted[0]
    assert two.take(wanted) == wanted[1]
    assert one.take(wanted) is None
    for store, each in zip((one, two), wanted, strict=True):
        store.finish(each, {"error": "out of memory"})
        for _ in range(2):
            store.study.enqueue_trial(
                {}, user_attrs={"trial": [each.stage, str(each.contender), each.lr, each.seed], "ends": 1}
            )
    assert two.take(wanted) == wanted[0]
    two.finish(wanted[0], {"error": "out of memory"})
    assert two.take(wanted) == wanted[1]
    assert two.take(wanted) is None  # what failed is tried once more, not twice
