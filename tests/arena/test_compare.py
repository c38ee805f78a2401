"""Comparisons end to end on tiny ground: complete, continued after a kill, shared, with failures shown."""

import dataclasses
import json
import os
import tempfile
import time
from html import escape

import pytest

from helpers import comparisons, workspace
from scalora import ScaloraError
from scalora.arena import run, trial
from scalora.arena.contender import Contender, parse_contender
from scalora.arena.plan import Chosen, Comparison, Trial
from scalora.arena.queue import TrialQueue
from scalora.arena.report import write_report
from scalora.arena.storage import open_study
from scalora.runs.recipe import load_recipe


@pytest.fixture
def comparison(tmp_path):
    return comparisons.small(tmp_path)


@pytest.fixture
def pageless(monkeypatch):
    """Without the report, whose pictures take a second each time."""
    monkeypatch.setattr(run, "write_report", lambda *arguments: None)


def test_every_trial_runs_once_and_the_test_split_only_at_the_chosen_rate(comparison, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(run, "run_trial", lambda c, t, *_: comparisons.fake_result(c, t, calls=calls))
    record = run.run_comparison(comparison, tmp_path / "out", command="x", log=lambda line: None)
    assert len(calls) == len(set(calls)) == 3 * 2 + 3 * 2
    assert {t.lr for t in calls if t.stage == "final"} == {1e-2}
    assert record.chosen == {c: Chosen(c, 1e-2) for c in comparison.contenders}
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 6
    assert f"<title>{escape(comparison.recipe.model)} on {escape(comparison.recipe.task.data.train)}</title>" in page
    assert "src=" not in page  # self-contained
    assert "scalora@2: gain over lora@2 +0.0500" in page
    again = run.run_comparison(comparison, tmp_path / "out", command="x", log=lambda line: None)
    assert len(calls) == 12  # nothing is run twice
    assert again.results == record.results
    assert (tmp_path / "out" / "report.html").read_text() == page  # nothing to look at twice either


def test_a_failed_trial_is_shown_and_does_not_end_the_rest(comparison, tmp_path, monkeypatch, pageless):
    broken = {"now": True}
    calls = []

    def is_broken(t):
        return broken["now"] and t.contender.method == "scalora"

    monkeypatch.setattr(run, "run_trial", lambda c, t, *_: comparisons.fake_result(c, t, calls=calls, broken=is_broken))
    lines = []
    record = run.run_comparison(comparison, tmp_path / "out", command="x", log=lines.append)
    assert any("failed: out of memory" in line for line in lines)
    assert "2 of 10 trials failed (--retry runs them again)" in lines[-1]
    broke = comparison.contenders[1]
    assert broke not in record.chosen
    write_report(record, tmp_path / "page.html")
    assert "out of memory" in (tmp_path / "page.html").read_text()
    broken["now"] = False
    count = len(calls)
    run.run_comparison(comparison, tmp_path / "out", command="x", log=lines.append)
    assert len(calls) == count
    record = run.run_comparison(
        comparison, tmp_path / "out", command="x", policy=run.Policy(retry=True), log=lines.append
    )
    assert record.chosen[broke] == Chosen(broke, 1e-2)


def test_a_killed_comparison_continues_where_it_stopped(comparison, tmp_path, monkeypatch, pageless):
    calls = []

    def dies_at_the_fourth(c, t, *_):
        if len(calls) == 3:
            raise KeyboardInterrupt
        return comparisons.fake_result(c, t, calls=calls)

    monkeypatch.setattr(run, "run_trial", dies_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        run.run_comparison(comparison, tmp_path / "out", command="x", log=lambda line: None)
    # The trial that was running belongs to a process that is gone.
    monkeypatch.setattr("scalora.arena.liveness._is_gone", lambda frozen: True)
    monkeypatch.setattr(run, "run_trial", lambda c, t, *_: comparisons.fake_result(c, t, calls=calls))
    run.run_comparison(comparison, tmp_path / "out", command="x", log=lambda line: None)
    assert len(calls) == len(set(calls)) == 12


def test_no_worker_waits_for_anothers_tuning_while_final_runs_could_go_on(comparison, tmp_path, monkeypatch, pageless):
    calls, idle, last = [], [], comparison.tuning()[-1]
    other = TrialQueue(tmp_path / "out", comparison)
    other.enqueue([last])
    assert other.take([last]) == last

    def at_last(seconds):
        idle.append(len(calls))
        other.finish(last, comparisons.fake_result(comparison, last))

    monkeypatch.setattr(run, "run_trial", lambda c, t, *_: comparisons.fake_result(c, t, calls=calls))
    monkeypatch.setattr(time, "sleep", at_last)
    run.run_comparison(comparison, tmp_path / "out", command="x", log=lambda line: None)
    assert idle == [5 + 4]  # everything but the other's trial and the final runs that it decides on
    assert [(t.stage, t.contender) for t in calls[9:]] == [("final", last.contender)] * 2


def test_a_silent_worker_is_taken_for_dead_whatever_its_number(comparison, tmp_path, monkeypatch):
    """A machine restarts, its name stays, and the number of the worker that died is another process's now."""
    sleeper, other = TrialQueue(tmp_path / "out", comparison), TrialQueue(tmp_path / "out", comparison)
    wanted = comparison.tuning()[:1]
    sleeper.enqueue(wanted)
    assert sleeper.take(wanted) == wanted[0]
    other.enqueue(wanted)
    assert other.take(wanted) is None  # it lives: this process
    monkeypatch.setattr(time, "time", lambda: 1e12)
    other.enqueue(wanted)
    assert other.take(wanted) is None  # whoever has seen no sign for a moment only knows nothing
    monkeypatch.setattr(time, "monotonic", lambda: 1e12)
    other.enqueue(wanted)
    assert other.take(wanted) == wanted[0]
    # The first one slept only; when it wakes, its result comes too late and harms nothing.
    sleeper.heartbeat(wanted[0])
    sleeper.finish(wanted[0], {"error": "late"})
    other.finish(wanted[0], comparisons.fake_result(comparison, wanted[0]))
    assert [list(result) for result in other.results().values()] == [
        list(comparisons.fake_result(comparison, wanted[0]))
    ]


def test_a_result_stays_while_the_same_trial_waits_again(comparison, tmp_path):
    """Two workers that look at the same moment both put a trial there; only failures are tried again on purpose."""
    store = TrialQueue(tmp_path / "out", comparison)
    good, bad = comparison.tuning()[:2]
    store.enqueue([good, bad, good])
    store.finish(store.take([good, bad]), comparisons.fake_result(comparison, good))
    store.finish(store.take([good, bad]), {"error": "out of memory"})
    assert set(store.results()) == {good, bad}
    store.enqueue([bad], retry=True)
    assert set(store.results()) == {good}


def test_trials_left_waiting_by_another_command_are_not_run(comparison, tmp_path):
    store = TrialQueue(tmp_path / "out", comparison)
    left, wanted = comparison.tuning()[:3], comparison.tuning()[3:]
    store.enqueue([*left, *wanted])
    assert [store.take(wanted) for _ in wanted] == wanted
    assert store.take(wanted) is None
    store.enqueue(left)  # the other command comes back
    assert [store.take(left) for _ in left] == left


@pytest.mark.parametrize(
    ("text", "contender"),
    [
        ("lora", Contender("lora", 4)),
        ("lora@16", Contender("lora", 16)),
        ("mora:type=1@8", Contender("mora", 8, (("type", 1),))),
        ("peft:LOHA", Contender("peft:LOHA", 4)),
        ("peft:LOHA:alpha=3@2", Contender("peft:LOHA", 2, (("alpha", 3),))),
        ("scalora:interval=2:scaling=paper", Contender("scalora", 4, (("interval", 2), ("scaling", "paper")))),
    ],
)
def test_contenders_are_written_with_options_and_rank(text, contender):
    assert parse_contender(text, 4) == contender
    assert parse_contender(str(contender), 1) == contender


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model=elsewhere", "another model"),
        ("method.dropout=0.1", "another dropout"),
        ("method.alpha=100", "another alpha"),
        ("method.options={interval: 3}", "another method.options"),  # trials of the method that it names take them over
        ("method.options={}", "another method.options"),
        ("task.data.seed=1", "another task"),
        ("task.data.folder=elsewhere", None),  # the same data may lie elsewhere today
        ("method.rank=4", None),  # a contender's matter
        ("training.learning_rate=7", None),  # every trial has its own
        ("training.seed=7", None),
    ],
)
def test_a_comparison_of_another_recipe_is_refused(comparison, tmp_path, override, words):
    TrialQueue(tmp_path / "out", comparison)
    recipe = load_recipe(workspace.lay(tmp_path), ["task.data.validation_size=10", "training.max_steps=4", override])
    other = Comparison(recipe, comparison.contenders, (1e-3,), (0,), (0,))
    if words is None:
        TrialQueue(tmp_path / "out", other)
    else:
        with pytest.raises(ScaloraError, match=words):
            TrialQueue(tmp_path / "out", other)


def test_a_store_of_an_earlier_version_is_continued(comparison, tmp_path):
    (tmp_path / "out").mkdir()
    study, _ = open_study(tmp_path / "out")
    early = {key: comparison.recipe.model_dump(mode="json")[key] for key in ("model", "dtype", "task", "training")}
    del early["task"]["data"]["folder"]
    study.set_user_attr("recipe", {**early, "target_modules": ["old"]})
    TrialQueue(tmp_path / "out", comparison)
    with pytest.raises(ScaloraError, match="another model"):
        TrialQueue(
            tmp_path / "out",
            dataclasses.replace(comparison, recipe=comparison.recipe.model_copy(update={"model": "x"})),
        )


def test_trial_recipes_differ_in_method_rate_and_seed_only(comparison):
    recipe = comparison.trial_recipe(Trial("tune", Contender("lora", 4), 1e-3, 7), "x")
    assert (recipe.method.name, recipe.method.rank, recipe.method.options) == ("lora", 4, {})
    assert (recipe.training["seed"], recipe.training["data_seed"], recipe.training["learning_rate"]) == (7, 7, 1e-3)
    assert recipe.task == comparison.recipe.task


def test_a_real_trial_in_its_own_process(comparison):
    beats = []
    result = trial.run_trial(
        comparison, Trial("tune", Contender("scalora", 2), 1e-2, 0), lambda: beats.append(1), every=0.05
    )
    assert len(beats) > 2
    assert result["split"] == "validation"
    assert result["peak_memory_bytes"] > 0
    assert result["losses"][-1][0] == 4
    failed = trial.run_trial(comparison, Trial("tune", Contender("lora", 1000), 1e-2, 0), list, every=60)
    assert "method.rank is 1000" in failed["error"]


def test_a_trial_leaves_no_files_behind(comparison, tmp_path, monkeypatch):
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))  # a folder of its own: other tests run beside this one
    result = trial.run_trial(comparison, Trial("final", Contender("full", 2), 1e-3, 0), list, every=60)
    assert result["ranks"]  # measured from what lay in files
    assert not list(place.glob("scalora-start-*"))


def test_a_trial_whose_parent_was_interrupted_while_it_began_says_nothing(tmp_path, capfd):
    process = trial._processes().Process(target=trial._main, args=(tmp_path / "gone",))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert capfd.readouterr().err == ""


def test_at_fixed_rates_nothing_is_tuned(comparison, tmp_path, monkeypatch, pageless):
    calls = []
    monkeypatch.setattr(run, "run_trial", lambda c, t, *_: comparisons.fake_result(c, t, calls=calls))
    lora, scalora, _ = comparison.contenders
    fixed = dataclasses.replace(comparison, fixed={lora: 1e-3, scalora: 2e-3})
    record = run.run_comparison(fixed, tmp_path / "out", command="x", log=lambda line: None)
    assert [(t.stage, t.contender, t.lr) for t in calls] == [
        ("final", c, lr) for _ in (0, 1) for c, lr in fixed.fixed.items()
    ]
    assert record.chosen == {lora: Chosen(lora, 1e-3), scalora: Chosen(scalora, 2e-3)}


def test_results_say_what_they_were_measured_with(comparison, tmp_path, monkeypatch, pageless):
    monkeypatch.setattr(run, "run_trial", lambda c, t, *_: comparisons.fake_result(c, t))
    run.run_comparison(comparison, tmp_path / "out", command="scalora compare x", log=lambda line: None)
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["command"] == "scalora compare x"
    assert content["environment"]["versions"]["torch"]
    assert len(content["trials"]) == 12
    assert os.path.exists(tmp_path / "out" / "trials.sqlite3")


def test_a_factor_is_not_for_the_head(comparison, tmp_path):
    overrides = [*workspace.classification(tmp_path), "task.data.validation_size=10"]
    recipe = load_recipe(tmp_path / "recipe.yaml", overrides)
    of_its_own = load_recipe(tmp_path / "recipe.yaml", [*overrides, "head_learning_rate=7e-3"])
    for name, factor in (("hira", 10), ("full", 0.1), ("lora", 1)):
        trial = Trial("tune", Contender(name, 4), 1e-3, 7)
        found = dataclasses.replace(comparison, recipe=recipe).trial_recipe(trial, "x")
        assert found.training["learning_rate"] == pytest.approx(1e-3 * factor)
        assert found.head_learning_rate == (None if factor == 1 else 1e-3)
        assert dataclasses.replace(comparison, recipe=of_its_own).trial_recipe(trial, "x").head_learning_rate == 7e-3
        published = dataclasses.replace(comparison, recipe=recipe, fixed={trial.contender: 1e-3})
        assert published.trial_recipe(trial, "x").head_learning_rate is None
        assert comparison.trial_recipe(trial, "x").head_learning_rate is None  # a language model has no head
