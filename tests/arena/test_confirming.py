"""Settings that lead run on further tuning seeds before one is chosen, so that one lucky seed does not decide."""

import dataclasses
import re

import pytest

from helpers import comparisons
from scalora.arena import run
from scalora.arena.confirming import LEADERS
from scalora.arena.contender import parse_contender
from scalora.arena.report import write_report
from scalora.arena.results import read_comparison
from scalora.arena.table import comparison_table

LORA, SCALORA = (parse_contender(name, 2) for name in ("lora", "scalora"))
# Rate → score at each tuning seed: the best one of the first seed fails or falls behind on the others.
STEADY, LUCKY, SLOW = 1e-2, 1e-1, 1e-3
SCORES = {SLOW: [0.5, 0.5, 0.5], STEADY: [0.7, 0.7, 0.7], LUCKY: [0.8, 0.3, 0.2]}


@pytest.fixture
def comparison(tmp_path):
    return dataclasses.replace(
        comparisons.small(tmp_path), contenders=(LORA, SCALORA), rates=(SLOW, STEADY, LUCKY), seeds=(0,)
    )


@pytest.fixture(autouse=True)
def _pageless(monkeypatch):
    monkeypatch.setattr(run, "write_report", lambda *arguments: None)


def _run(comparison, folder, monkeypatch, result, **policy):
    """Trials in the order in which they ran, and the record."""
    calls = []

    def run_trial(c, trial, *_):
        calls.append(trial)
        return result(trial) if "after" not in result(trial) else comparisons.fake_result(c, trial) | result(trial)

    monkeypatch.setattr(run, "run_trial", run_trial)
    order = {"command": "x", "log": lambda line: None, "policy": run.Policy(**policy)}
    return calls, run.run_comparison(comparison, folder / "out", **order)


def _score(trial):
    score = SCORES.get(trial.lr, [0.1] * 3)[trial.seed]
    return {"after": {"accuracy": score, "nll": 1 - score}}


def test_the_best_mean_of_the_leaders_is_chosen_and_nothing_else_runs_again(comparison, tmp_path, monkeypatch):
    calls, record = _run(comparison, tmp_path, monkeypatch, _score, confirm=2)
    for contender in comparison.contenders:
        again = {(t.lr, t.seed) for t in calls if t.stage == "tune" and t.contender == contender and t.seed > 0}
        assert again == {(STEADY, 1), (STEADY, 2), (LUCKY, 1), (LUCKY, 2)}
        assert record.chosen[contender].lr == STEADY
        assert {t.lr for t in calls if t.stage == "final" and t.contender == contender} == {STEADY}
    assert len(calls) == len(set(calls))
    assert read_comparison(tmp_path / "out").chosen == record.chosen  # the trials alone say what was chosen


def test_without_it_the_first_seed_decides_and_the_same_command_goes_on_with_it(comparison, tmp_path, monkeypatch):
    _, record = _run(comparison, tmp_path, monkeypatch, _score)
    assert record.chosen[LORA].lr == LUCKY
    calls, record = _run(comparison, tmp_path, monkeypatch, _score, confirm=1)
    assert record.chosen[LORA].lr == STEADY
    assert {(t.lr, t.seed) for t in calls if t.stage == "tune"} == {(STEADY, 1), (LUCKY, 1)}


@pytest.mark.parametrize("end", [{"error": "diverged"}, {"given_up": {"step": 2, "of": 4, "loss": 2.0, "bar": 1.0}}])
def test_a_leader_that_does_not_end_on_every_seed_is_out(end, comparison, tmp_path, monkeypatch):
    def result(trial):
        broken = trial.stage == "tune" and trial.lr == LUCKY and trial.seed == 2
        return end if broken else {"after": {"accuracy": SCORES[trial.lr][0], "nll": 0.5}}

    calls, record = _run(comparison, tmp_path, monkeypatch, result, confirm=2)
    assert record.chosen[LORA].lr == STEADY
    assert {t.lr for t in calls if t.stage == "final"} == {STEADY}


def test_where_no_leader_ends_on_every_seed_the_next_ones_are_looked_at(comparison, tmp_path, monkeypatch):
    def result(trial):
        return {"error": "diverged"} if trial.seed > 0 and trial.lr != SLOW else _score(trial)

    calls, record = _run(comparison, tmp_path, monkeypatch, result, confirm=1)
    again = {(t.lr, t.seed) for t in calls if t.stage == "tune" and t.contender == LORA and t.seed > 0}
    assert again == {(LUCKY, 1), (STEADY, 1), (SLOW, 1)}
    assert record.chosen[LORA].lr == SLOW


def test_rates_beyond_the_grid_are_looked_at_again_too(comparison, tmp_path, monkeypatch):
    calls, record = _run(comparison, tmp_path, monkeypatch, _score, confirm=2, extend=1)
    assert record.chosen[LORA].lr == STEADY
    tuned = [t for t in calls if t.stage == "tune" and t.contender == LORA]
    assert [t.lr for t in tuned if t.seed == 0][-1] == 1.0  # before anything ran again
    assert sum(t.seed > 0 for t in tuned) == 2 * LEADERS
    again, _ = _run(comparison, tmp_path, monkeypatch, _score, confirm=2, extend=1)
    assert again == []


def test_the_page_counts_every_trial_and_says_of_how_many_seeds_a_mean_is(comparison, tmp_path, monkeypatch):
    calls, record = _run(comparison, tmp_path, monkeypatch, _score, confirm=2, extend=1)
    write_report(record, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert f"{len(calls)} of {len(calls)} trials done" in page
    assert "<td>0.7000 (3 seeds)</td>" in page
    assert "<td>0.5000</td>" in page
    shown = comparison_table(record.comparison, record.results).text("contender", rates=True)
    assert shown.rows[0] == ["lora@2", "0.500", "0.700 (3 seeds)", "0.433 (3 seeds)"]
    broken = dataclasses.replace(record, results={t: r for t, r in record.results.items() if t.stage == "tune"})
    write_report(broken, tmp_path / "page.html")
    assert f"{len(calls) - 2} of {len(calls)} trials done" in (tmp_path / "page.html").read_text()


def test_the_count_of_what_is_done_never_falls(comparison, tmp_path, monkeypatch):
    """A confirmed setting at an edge has the grid grow; what was confirmed before goes on counting."""
    scores = {SLOW: [0.1] * 3, STEADY: [0.8, 0.2, 0.2], LUCKY: [0.7] * 3, 1.0: [0.6] * 3}
    two = dataclasses.replace(comparison, contenders=(LORA,), rates=(STEADY, LUCKY))
    lines = []
    monkeypatch.setattr(
        run,
        "run_trial",
        lambda c, t, *_: (
            comparisons.fake_result(c, t) | {"after": {"accuracy": scores.get(t.lr, [0.0] * 3)[t.seed], "nll": 0.5}}
        ),
    )
    run.run_comparison(two, tmp_path / "out", command="x", policy=run.Policy(extend=1, confirm=2), log=lines.append)
    done = [int(re.match(r"\[(\d+)/", line)[1]) for line in lines if line.startswith("[")]
    assert done == sorted(done)
    assert any("lr 1 seed 0" in line for line in lines)


def test_of_a_single_setting_nothing_is_to_be_chosen(comparison, tmp_path, monkeypatch):
    single = dataclasses.replace(comparison, rates=(STEADY,))
    calls, _ = _run(single, tmp_path, monkeypatch, _score, confirm=2)
    assert {t.seed for t in calls} == {0}
