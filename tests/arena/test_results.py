"""results.json: what it keeps, what it reads, how a clone goes on from it, and the page made of it."""

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from helpers import comparisons
from scalora import ScaloraError
from scalora.arena import run
from scalora.arena.contender import Contender
from scalora.arena.plan import Trial
from scalora.arena.queue import TrialQueue
from scalora.arena.results import (
    ComparisonRecord,
    decode_comparison,
    encode_comparison,
    read_comparison,
    thinned,
    write_comparison,
)
from scalora.cli import app


@pytest.fixture
def record(tmp_path):
    comparison = comparisons.small(tmp_path)
    (tmp_path / "out").mkdir()
    return ComparisonRecord(
        comparison, comparisons.run_all(comparison), "scalora compare x", "abc", comparisons.ENVIRONMENT
    )


def _first_format(record):
    """As the version before wrote it."""
    content = json.loads(json.dumps(encode_comparison(record)))
    for key in ("format", "contenders", "curve", "fixed", "ranks", "environments"):
        del content[key]
    content["trials"] = [
        {"stage": t.stage, "contender": str(t.contender), "lr": t.lr, "seed": t.seed, **result}
        for t, result in sorted(record.results.items())
    ]
    return content


def test_what_is_written_is_read_without_the_ranks_of_tuning(record, tmp_path):
    write_comparison(record, tmp_path / "out")
    found = read_comparison(tmp_path / "out")
    assert dataclasses.replace(found, results=record.results) == record
    for trial, result in record.results.items():
        dropped = ("ranks",) if trial.stage == "tune" else ()
        assert found.results[trial] == {key: value for key, value in result.items() if key not in dropped}
    lines = (tmp_path / "out" / "results.json").read_text().splitlines()
    assert sum('"stage"' in line for line in lines) == len(record.results) == 12
    assert sum('"processor"' in line for line in lines) == 2  # the last writer's, and that of all trials


def test_a_curve_of_tuning_is_thinned_once():
    losses = [[step, 1 / step] for step in range(1, 31)]
    found = thinned(losses)
    assert len(found) <= 12
    assert found[0] == [3, pytest.approx((1 + 1 / 2 + 1 / 3) / 3, rel=1e-3)]
    assert found[-1][0] == 30
    assert thinned(found) == found
    assert thinned([]) == []


@pytest.mark.parametrize("given", ["tuned", "curve", "fixed", "without ranks", "failed"])
def test_the_format_before_is_read(record, given):
    comparison, results = record.comparison, dict(record.results)
    if given == "curve":
        curve = tuple(Contender("lora", rank) for rank in (1, 2, 4, 8, 16, 32))
        comparison = dataclasses.replace(comparison, curve=curve)
        results |= {trial: comparisons.fake_result(comparison, trial) for trial in comparison.tuning()}
    elif given == "fixed":
        comparison = dataclasses.replace(comparison, fixed=dict.fromkeys(comparison.contenders, 1e-2))
        results = {trial: result for trial, result in results.items() if trial.stage == "final"}
    elif given == "without ranks":
        comparison = dataclasses.replace(comparison, ranks=False)
        results = {trial: {**result, "ranks": []} for trial, result in results.items()}
    elif given == "failed":
        last = comparison.contenders[-1]
        results = {t: {"error": "out of memory"} if t.contender == last else r for t, r in results.items()}
    old = dataclasses.replace(record, comparison=comparison, results=results)
    assert decode_comparison(_first_format(old), "old.json") == old


def test_trials_that_another_command_tuned_are_no_contenders(record):
    stray = Trial("tune", Contender("mora", 2), 1e-3, 0)
    results = {**record.results, stray: comparisons.fake_result(record.comparison, stray)}
    found = decode_comparison(_first_format(dataclasses.replace(record, results=results)), "old.json")
    assert found.comparison.contenders == record.comparison.contenders
    assert stray in found.results


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "is no JSON"),
        ("[]", "is no JSON object"),
        ('{"experiment": "fig1"}', "holds no trials"),
        ('{"trials": [], "format": 3}', "update scalora"),
        ('{"trials": [], "format": 2}', "is damaged"),
    ],
)
def test_what_cannot_be_read_is_refused_with_one_message(tmp_path, content, words):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(ScaloraError, match=words):
        read_comparison(tmp_path)


def test_a_clone_goes_on_from_results_alone(record, tmp_path, monkeypatch):
    """Without the queue that git does not carry nothing is run again, and what is new is."""
    calls = []
    monkeypatch.setattr(run, "write_report", lambda *arguments: None)
    monkeypatch.setattr(run, "check_recipe", lambda recipe: ([], None))
    monkeypatch.setattr(run, "run_trial", lambda c, t, *_: comparisons.fake_result(c, t, calls=calls))
    write_comparison(record, tmp_path / "out")
    more = dataclasses.replace(record.comparison, seeds=(0, 1, 2))
    run.check_comparison(more, tmp_path / "out")
    found = run.run_comparison(more, tmp_path / "out", command="x", log=lambda line: None)
    assert {trial.seed for trial in calls} == {2}
    assert len(found.results) == 12 + 3
    assert found.results.keys() > record.results.keys()
    assert read_comparison(tmp_path / "out").comparison.seeds == (0, 1, 2)


def test_queue_and_results_lose_nothing_to_each_other(record, tmp_path):
    """A queue that knows some trials meets a results.json that knows others, such as after a pull."""
    comparison, trials = record.comparison, list(record.results)
    queue = TrialQueue(tmp_path / "out", comparison)
    queue.enqueue(trials[:4])
    for trial in trials[:3]:
        taken = queue.take([trial])
        queue.finish(trial, {"error": "out of memory"} if trial == trials[0] else {**record.results[taken], "mine": 1})
    broken = {trials[1]: {"error": "theirs"}, trials[4]: {"error": "theirs"}}
    write_comparison(dataclasses.replace(record, results={**record.results, **broken}), tmp_path / "out")
    found = TrialQueue(tmp_path / "out", comparison).results()
    assert found.keys() == record.results.keys()
    assert "error" not in found[trials[0]]  # it failed here and succeeded there
    assert found[trials[1]]["mine"] == found[trials[2]]["mine"] == 1
    assert found[trials[4]] == {"error": "theirs"}
    again = TrialQueue(tmp_path / "out", comparison)
    assert again.results() == found
    assert len(again.study.trials) == len(queue.study.trials)  # nothing is added twice


def test_results_of_another_recipe_are_refused_before_a_queue_is_made(record, tmp_path):
    write_comparison(record, tmp_path / "out")
    other = comparisons.small(tmp_path, "task.data.seed=1")
    with pytest.raises(ScaloraError, match="another task"):
        TrialQueue(tmp_path / "out", other)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["results.json"]


@pytest.mark.parametrize("old", [False, True])
def test_report_writes_the_page_again(record, tmp_path, old):
    out = tmp_path / "out"
    (out / "results.json").write_text(json.dumps(_first_format(record) if old else encode_comparison(record)))
    result = CliRunner().invoke(app, ["report", str(out), "--output", str(tmp_path / "new" / "page.html")])
    assert result.exit_code == 0, result.stderr
    page = (tmp_path / "new" / "page.html").read_text()
    assert page.count("<svg") == 6
    assert "scalora@2: gain over lora@2 +0.0500" in page
    assert "scalora@2: gain over lora@2 +0.0500" in result.stdout.replace("\n", " ")
    assert [file.name for file in out.iterdir()] == ["results.json"]


def test_report_of_a_folder_without_results_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        result = CliRunner().invoke(app, ["report", str(folder)])
        assert result.exit_code == 2
        assert "holds no results.json" in result.stderr
        assert len(result.stderr.strip().splitlines()) == 1


def test_report_takes_no_folder_for_a_file(record, tmp_path):
    write_comparison(record, tmp_path / "out")
    result = CliRunner().invoke(app, ["report", str(tmp_path / "out"), "--output", str(tmp_path)])
    assert result.exit_code == 2
    assert "is a folder" in result.stderr


@pytest.mark.parametrize("key", ["after", "seconds_per_step", "losses", "environment"])
@pytest.mark.parametrize("value", [None, "x"])
def test_report_of_damaged_results_is_one_message(record, tmp_path, key, value):
    out = tmp_path / "out"
    content = encode_comparison(record)
    trial = next(line for line in content["trials"] if line["stage"] == "final")
    trial[key] = value
    (out / "results.json").write_text(json.dumps(content))
    result = CliRunner().invoke(app, ["report", str(out), "--output", str(tmp_path / "page.html")])
    assert result.exit_code == 2, result.output
    assert "is damaged" in result.stderr.replace("\n", " ")
    assert result.exception is None or isinstance(result.exception, SystemExit)


def test_a_damaged_queue_is_one_message(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "trials.sqlite3").write_text("garbage " * 200)
    with pytest.raises(ScaloraError, match=r"trials.sqlite3 cannot be used .* delete it"):
        TrialQueue(tmp_path / "out", comparisons.small(tmp_path))
