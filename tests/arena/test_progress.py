"""The first result early, a table that fills, and how long the rest will take."""

import dataclasses
import io

import pytest
from rich.console import Console

from helpers import comparisons
from scalora.arena import run
from scalora.arena.contender import parse_contender
from scalora.arena.progress import in_minutes, seconds_left
from scalora.cli.compare import _board

LORA, SCALORA, WIDE = (parse_contender(text, 2) for text in ("lora", "scalora", "lora@4"))
SECONDS = {LORA: 1.0, SCALORA: 2.0, WIDE: 4.0}


@pytest.fixture
def worked(tmp_path, monkeypatch):
    """Trials in the order they were run, tables that were shown and lines that were said."""
    comparison = comparisons.small(tmp_path)
    comparison = dataclasses.replace(comparison, curve=(parse_contender("lora@1", 2), LORA))
    calls, tables, lines, clock = [], [], [], [0.0]

    def run_trial(c, trial, *_):
        clock[0] += SECONDS.get(trial.contender, 1.0)
        return comparisons.fake_result(c, trial, calls=calls)

    monkeypatch.setattr(run, "run_trial", run_trial)
    monkeypatch.setattr(run, "write_report", lambda *arguments: None)
    monkeypatch.setattr(run.time, "perf_counter", lambda: clock[0])
    run.run_comparison(comparison, tmp_path / "out", command="x", log=lines.append, show=tables.append)
    return comparison, calls, tables, lines


def test_one_contender_comes_after_the_other_each_with_its_final_runs(worked):
    _, calls, _, _ = worked
    order = [(trial.stage, trial.contender) for trial in calls]
    expected = [(stage, c) for c in (LORA, SCALORA, WIDE) for stage in ("tune", "tune", "final", "final")]
    assert order == expected + [("tune", parse_contender("lora@1", 2))] * 2


def test_the_table_fills(worked):
    _, _, tables, _ = worked
    assert tables[0].columns[:4] == ["method", "tuned", "lr", "final"]
    assert tables[0].rows[0] == ["lora@2", "0/2", "", "0/2", ""]
    assert tables[3].rows[0] == ["lora@2", "2/2", "0.01", "1/2", "0.6000"]
    assert tables[-1].rows[0] == ["lora@2", "2/2", "0.01", "2/2", "0.6050 ± 0.0050"]
    assert tables[-1].rows[3] == ["lora@1", "2/2", "", "", ""]
    console = Console(file=io.StringIO(), force_terminal=True, width=80)
    with _board(console) as show:
        show(tables[3])
    assert "0.6000" in console.file.getvalue()
    quiet = Console(file=io.StringIO())
    with _board(quiet) as show:
        show(tables[3])
    assert quiet.file.getvalue() == ""


def test_what_is_left_is_known_by_what_each_contender_took(worked):
    comparison, calls, _, lines = worked
    total = sum(SECONDS.get(trial.contender, 1.0) for trial in calls)
    stages = run._stages(comparison, {}, run.Policy())
    assert seconds_left(comparison, stages, {}, 1) is None
    results, passed = {}, 0.0
    for done, trial in enumerate(calls, start=1):
        passed += SECONDS.get(trial.contender, 1.0)
        results[trial] = comparisons.fake_result(comparison, trial) | {
            "wall_seconds": SECONDS.get(trial.contender, 1.0)
        }
        left = seconds_left(comparison, run._stages(comparison, results, run.Policy()), results, 1)
        if done >= 10 and left:
            assert left == pytest.approx(total - passed, rel=1 / 3)
            assert seconds_left(comparison, run._stages(comparison, results, run.Policy()), results, 2) == left / 2
    assert left == 0
    assert "[10/14]" in lines[9]
    assert "(4 s; about" in lines[9]
    assert "left" not in lines[-1]


@pytest.mark.parametrize(("seconds", "words"), [(0.2, "1 s"), (89, "89 s"), (600, "10 min"), (9000, "2.5 h")])
def test_durations_are_rough(seconds, words):
    assert in_minutes(seconds) == words
