"""Tuning trials that are far behind end early, are shown as such, and run to their end where that is asked for."""

import dataclasses
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers import comparisons
from scalora.arena import run
from scalora.arena.contender import parse_contender
from scalora.arena.plan import Trial
from scalora.arena.pruning import MARGINS, bars, given_up_sentence
from scalora.arena.queue import TrialQueue
from scalora.arena.results import read_comparison
from scalora.runs.giving_up import Bar, GivenUp, GiveUp, level

CURVE = [[step, 5.0 - step / 10] for step in range(1, 31)]
LORA, SCALORA = parse_contender("lora", 2), parse_contender("scalora", 2)


@pytest.fixture
def comparison(tmp_path):
    return comparisons.small(tmp_path)


def _finished(comparison, trial, losses=CURVE, **after):
    result = comparisons.fake_result(comparison, trial) | {"losses": losses, "steps": 30}
    return result | ({"after": after} if after else {})


@given(st.lists(st.floats(0, 9), min_size=12, max_size=40), st.sampled_from([1 / 3, 2 / 3, 1.0]))
def test_the_level_is_the_mean_of_the_quarter_before(losses, share):
    steps = len(losses)
    found = level(list(enumerate(losses, start=1)), steps, share)
    until = share * steps
    recent = [loss for step, loss in enumerate(losses, start=1) if 0.75 * until < step <= until]
    assert found == pytest.approx(sum(recent) / len(recent))
    assert level([], steps, share) is None


def test_a_trial_is_held_against_the_best_of_its_contender_at_its_seed(comparison):
    low, high = Trial("tune", LORA, 1e-3, 0), Trial("tune", LORA, 1e-2, 0)
    steep = [[step, 5.0 - step / 6] for step in range(1, 31)]
    results = {low: _finished(comparison, low, accuracy=0.9), high: _finished(comparison, high, steep, accuracy=0.8)}
    margins = {1 / 3: 0.2, 2 / 3: 0.1}
    third, two_thirds = bars(comparison, results, Trial("tune", LORA, 1e-4, 0), margins)
    at, gained = 5.0 - 9 / 10, 9 / 10 - 1 / 10  # steps 8 to 10 of the curve with the better score
    assert third == pytest.approx((1 / 3, at + 0.2 * gained))
    at, gained = 5.0 - 18 / 10, 18 / 10 - 1 / 10
    assert two_thirds == pytest.approx((2 / 3, at + 0.1 * gained))
    assert [bar.share for bar in bars(comparison, results, Trial("tune", LORA, 1e-4, 0))] == list(MARGINS)
    assert bars(comparison, results, Trial("tune", LORA, 1e-4, 1)) == []
    assert bars(comparison, results, Trial("tune", SCALORA, 1e-3, 0)) == []
    assert bars(comparison, results, Trial("final", LORA, 1e-3, 0)) == []


def test_a_setting_of_several_contenders_is_held_against_what_all_of_them_have(comparison):
    wide = parse_contender("lora:alpha=4/64", 2)  # 4 is the recipe's own at rank 2
    shared = dataclasses.replace(comparison, contenders=(LORA, wide))
    (plain,), (same, other) = shared.settings[LORA], shared.settings[wide]
    assert plain == same
    better = Trial("tune", other, 1e-3, 0)
    results = {better: _finished(shared, better)}
    assert bars(shared, results, Trial("tune", plain, 1e-3, 0)) == []  # or `lora` would be left without any rate
    assert bars(shared, results, better._replace(lr=1e-2))
    own = Trial("tune", plain, 1e-3, 0)
    results[own] = _finished(shared, own, accuracy=0.1)
    assert bars(shared, results, own._replace(lr=1e-2))


@pytest.mark.parametrize("losses", [[], [[30, 2.0]], [[10, 5.0], [20, 5.5], [30, 4.0]]])
def test_who_had_gained_nothing_by_then_sets_no_bar(comparison, losses):
    trial = Trial("tune", LORA, 1e-3, 0)
    results = {trial: _finished(comparison, trial, losses)}
    assert bars(comparison, results, trial._replace(lr=1e-2)) == []


@pytest.mark.parametrize(("bar", "ends"), [(4.0, 10), (4.2, None), (float("nan"), 10)])
def test_a_run_ends_at_the_first_step_behind_its_bar(bar, ends):
    callback, state = GiveUp([Bar(1 / 3, bar)]), SimpleNamespace(max_steps=30, log_history=[], global_step=0)

    def go():
        for step, loss in CURVE:
            callback.on_step_begin(None, state, None)
            state.global_step = step
            state.log_history.append({"step": step, "loss": loss})

    if ends is None:
        go()
        return
    with pytest.raises(GivenUp, match=f"step {ends} of 30"):
        go()


def test_what_was_given_up_has_no_score_and_runs_where_asked_for(comparison, tmp_path, monkeypatch):
    bad, calls = Trial("tune", SCALORA, 1e-3, 0), []

    def run_trial(c, trial, alive, every, inputs, bars):
        calls.append(trial)
        if trial == bad and bars:
            return {"given_up": {"step": 10, "of": 30, "loss": 4.9, "bar": bars[0].loss}, "losses": CURVE[:10]}
        return _finished(c, trial)

    lines = []
    monkeypatch.setattr(run, "run_trial", run_trial)
    order = {"command": "x", "log": lines.append}
    # Even grids begin below the middle, so this one knows the better rate first.
    turned = dataclasses.replace(comparison, contenders=(LORA, SCALORA))
    queue = TrialQueue(tmp_path / "out", turned)
    good = bad._replace(lr=1e-2)
    queue.enqueue([good])
    queue.take([good])
    queue.finish(good, _finished(turned, good))
    record = run.run_comparison(turned, tmp_path / "out", policy=run.Policy(prune=True), **order)
    assert "given_up" in record.results[bad]
    assert any("given up at step 10 of 30" in line for line in lines)
    assert record.chosen[SCALORA].lr == 1e-2
    assert "1 of 4 tuning trials were given up" in given_up_sentence(record.results)
    assert "17% of the steps" in given_up_sentence(record.results)
    assert given_up_sentence(record.results) in (tmp_path / "out" / "report.html").read_text()
    assert read_comparison(tmp_path / "out").results[bad]["given_up"] == record.results[bad]["given_up"]

    before = len(calls)
    (tmp_path / "out" / "trials.sqlite3").unlink()  # as in a clone
    assert (
        run.run_comparison(turned, tmp_path / "out", policy=run.Policy(prune=True), **order).results.keys()
        == record.results.keys()
    )
    assert len(calls) == before
    again = run.run_comparison(turned, tmp_path / "out", **order)
    assert calls[before:] == [bad]
    assert "after" in again.results[bad]
    assert given_up_sentence(again.results) is None


def test_a_real_trial_that_is_behind_ends_in_its_process(tmp_path):
    comparison = comparisons.small(tmp_path, "training.max_steps=6", "training.logging_steps=1")
    trial = Trial("tune", LORA, 1e-3, 0)
    result = run.run_trial(comparison, trial, lambda: None, 60.0, None, [Bar(2 / 3, 0.0)])
    assert result["given_up"].keys() == {"step", "of", "loss", "bar"}
    assert (result["given_up"]["step"], result["given_up"]["of"]) == (4, 6)
    assert [step for step, _ in result["losses"]] == [1, 2, 3, 4]
