"""A method that chose the last rate of the grid is tried beyond it, so many times and no more, and a page says so."""

import dataclasses

import pytest

from helpers import comparisons
from scalora.arena import run
from scalora.arena.contender import parse_contender
from scalora.arena.extending import edge_sentence, extension, next_rate
from scalora.arena.plan import Chosen, Trial
from scalora.arena.report import write_report
from scalora.arena.table import comparison_table

LORA = parse_contender("lora", 2)


@pytest.fixture
def comparison(tmp_path):
    return dataclasses.replace(comparisons.small(tmp_path), contenders=(LORA, parse_contender("scalora", 2)))


@pytest.fixture(autouse=True)
def _pageless(monkeypatch):
    """Without the report, whose pictures take a second each time."""
    monkeypatch.setattr(run, "write_report", lambda *arguments: None)


def _run(comparison, folder, monkeypatch, best, extend):
    """Trials in the order they were run, and the record; the nearer a rate is to the best one, the better it is."""
    calls = []

    def run_trial(c, trial, *_):
        calls.append(trial)
        off = abs(trial.lr / best - 1) if trial.lr > best else abs(best / trial.lr - 1)
        return comparisons.fake_result(c, trial) | {"after": {"accuracy": 1 / (1 + off), "nll": off}}

    monkeypatch.setattr(run, "run_trial", run_trial)
    order = {"command": "x", "log": lambda line: None, "policy": run.Policy(extend=extend)}
    return calls, run.run_comparison(comparison, folder / "out", **order)


@pytest.mark.parametrize(
    ("best", "beyond", "edge"),
    [
        (0.1, [0.1, 1.0], None),
        (5.0, [0.1, 1.0], "highest, 1"),
        (1e-4, [1e-4, 1e-5], None),
        (1e-6, [1e-4, 1e-5], "lowest, 1e-05"),
    ],
)
def test_a_grid_grows_until_the_best_rate_is_inside_or_the_limit_is_reached(
    best, beyond, edge, comparison, tmp_path, monkeypatch
):
    calls, record = _run(comparison, tmp_path, monkeypatch, best, extend=2)
    for contender in comparison.contenders:
        tuned = [t.lr for t in calls if t.stage == "tune" and t.contender == contender]
        assert sorted(tuned[2:]) == sorted(beyond)
        final = {t.lr for t in calls if t.stage == "final" and t.contender == contender}
        assert final == {record.chosen[contender].lr}
        assert min(final) == pytest.approx(best if edge is None else beyond[-1])
    assert len(calls) == len(set(calls))
    said = edge_sentence(comparison, record.results)
    assert (said is None) == (edge is None)
    assert edge is None or f"lora@2 the {edge};" in said
    chosen = record.chosen[LORA].lr
    assert set(comparison_table(comparison, record.results).rates) == {1e-3, 1e-2, chosen}  # with a column of its own


@pytest.mark.parametrize("first", ["better", "worse"])
def test_a_rate_beyond_the_grid_runs_on_every_tuning_seed(first, comparison, tmp_path, monkeypatch):
    """Whatever the first seed says there: a rate judged by it alone would stand beside means of all."""
    several = dataclasses.replace(comparison, tuning_seeds=(0, 1, 2))
    offset = {"better": 1.0, "worse": -1.0}[first]
    calls = []

    def run_trial(c, trial, *_):
        calls.append(trial)
        lucky = offset if trial.lr == 0.1 and trial.seed == 0 else 0.0
        score = {1e-3: 0.1, 1e-2: 0.5, 0.1: 0.4}.get(trial.lr, 0.0) + lucky
        return comparisons.fake_result(c, trial) | {"after": {"accuracy": score, "nll": 1 - score}}

    monkeypatch.setattr(run, "run_trial", run_trial)
    policy = run.Policy(extend=1)
    record = run.run_comparison(several, tmp_path / "out", command="x", log=lambda line: None, policy=policy)
    assert [t.seed for t in calls if t.stage == "tune" and t.contender == LORA and t.lr == 0.1] == [0, 1, 2]
    assert record.chosen[LORA].lr == {"better": 0.1, "worse": 1e-2}[first]


def test_without_leave_nothing_goes_beyond_the_grid(comparison, tmp_path, monkeypatch):
    calls, record = _run(comparison, tmp_path, monkeypatch, best=5.0, extend=0)
    assert {t.lr for t in calls} == {1e-3, 1e-2}
    assert "lora@2 the highest, 0.01" in edge_sentence(comparison, record.results)
    write_report(record, tmp_path / "page.html")
    assert edge_sentence(comparison, record.results) in (tmp_path / "page.html").read_text()
    again, _ = _run(comparison, tmp_path, monkeypatch, best=5.0, extend=1)  # the same command with more leave goes on
    assert {t.lr for t in again} == {0.1}


def test_nothing_is_extended_before_all_of_the_grid_is_known(comparison):
    results = comparisons.run_all(comparison)
    assert extension(comparison, results, 2)
    del results[Trial("tune", LORA, 1e-3, 0)]
    assert {t.contender.method for t in extension(comparison, results, 2)} == {"scalora"}
    fixed = dataclasses.replace(comparison, fixed=dict.fromkeys(comparison.contenders, 1e-2))
    assert extension(fixed, results, 2) == []
    assert edge_sentence(fixed, results) is None


def test_a_failed_rate_is_an_end_of_the_grid_too(comparison):
    results = comparisons.run_all(comparison)
    results[Trial("tune", LORA, 0.1, 0)] = {"error": "diverged"}
    assert next_rate(comparison, results, Chosen(LORA, 1e-2), 2) is None


def test_a_single_rate_has_neighbours_at_three_times_it(comparison):
    single = dataclasses.replace(comparison, rates=(1e-2,))
    results = comparisons.run_all(single)
    assert next_rate(single, results, Chosen(LORA, 1e-2), 1) == 0.03
