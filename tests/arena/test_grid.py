"""Tuning over more than the rate: alpha for all, and several values of a contender's own options."""

import dataclasses
import json

import pytest
from typer.testing import CliRunner

from helpers import comparisons, workspace
from scalora import ScaloraError
from scalora.arena import run
from scalora.arena.contender import Contender, parse_contender
from scalora.arena.plan import Chosen, Trial
from scalora.arena.queue import TrialQueue
from scalora.arena.report import write_report
from scalora.arena.results import ComparisonRecord, decode_comparison, encode_comparison, write_comparison
from scalora.arena.table import comparison_table
from scalora.cli import app

OWN = 4  # the recipe's alpha, at rank 2


@pytest.fixture
def grid(tmp_path):
    """Of twice the recipe's alpha and its own for all that have one, and two intervals of ScaLoRA's."""
    comparison = comparisons.small(tmp_path, "method.rank=2", f"method.alpha={OWN}")
    contenders = tuple(parse_contender(text, 2) for text in ("lora", "scalora:interval=5/10", "lora@4", "full", "mora"))
    return dataclasses.replace(comparison, contenders=contenders, alphas=(8.0, OWN))


def _result(comparison, trial, *_, calls=None):
    """8 is the best alpha at rank 2, the recipe's own at others, and 10 the better interval."""
    result = comparisons.fake_result(comparison, trial, calls=calls)
    options = dict(trial.contender.options)
    gain = 0.02 * (("alpha" in options) == (trial.contender.rank == 2)) + 0.01 * (options.get("interval") == 10)
    return {**result, "after": {name: value + gain for name, value in result["after"].items()}}


@pytest.fixture
def calls(monkeypatch):
    found = []
    monkeypatch.setattr(run, "run_trial", lambda c, t, *_: _result(c, t, calls=found))
    monkeypatch.setattr(run, "check_recipe", lambda recipe: ([], None))
    monkeypatch.setattr(run, "write_report", lambda *arguments: None)
    return found


def test_settings_are_all_combinations_with_the_recipes_own_alpha_left_out(grid):
    lora, scalora, wide, full, mora = grid.contenders
    assert [*map(str, grid.settings[lora])] == ["lora:alpha=8@2", "lora@2"]
    assert [*map(str, grid.settings[scalora])] == [
        "scalora:interval=5:alpha=8@2", "scalora:interval=5@2", "scalora:interval=10:alpha=8@2", "scalora:interval=10@2"
    ]  # fmt: skip
    assert [*map(str, grid.settings[wide])] == ["lora:alpha=16@4", "lora@4"]  # the same scales
    assert (grid.settings[full], grid.settings[mora]) == ((full,), (mora,))  # they have none
    assert len(grid.tuning()) == len(set(grid.tuning())) == (2 + 4 + 2 + 1 + 1) * 2


def test_a_trial_gets_its_setting(grid):
    def method(text):
        return grid.trial_recipe(Trial("tune", parse_contender(text, 2), 1e-3, 0), "x").method

    assert method("lora:alpha=8").alpha == 8
    assert method("lora").alpha == OWN
    assert method("lora@4").alpha == 2 * OWN
    assert (method("scalora:interval=10:alpha=8").alpha, method("scalora:interval=10").options) == (8, {"interval": 10})
    assert method("peft:LOHA:alpha=3").alpha == 3


def test_each_contenders_best_setting_is_used_in_its_final_runs(grid, tmp_path, calls):
    record = run.run_comparison(grid, tmp_path / "out", command="x", log=lambda line: None)
    best = {
        "lora@2": "lora:alpha=8@2",
        "scalora:interval=5/10@2": "scalora:interval=10:alpha=8@2",
        "lora@4": "lora@4",
        "full@2": "full@2",
        "mora@2": "mora@2",
    }
    assert {str(c): str(chosen.contender) for c, chosen in record.chosen.items()} == best
    final = [trial for trial in calls if trial.stage == "final"]
    assert {(str(t.contender), t.lr) for t in final} == {(setting, 1e-2) for setting in best.values()}
    assert len(calls) == len(set(calls)) == len(grid.tuning()) + len(final)
    assert len(final) == len(best) * len(grid.seeds)


def test_what_is_kept_is_read_again_and_not_run_again(grid, tmp_path, calls):
    run.run_comparison(grid, tmp_path / "out", command="x", log=lambda line: None)
    content = json.loads((tmp_path / "out" / "results.json").read_text())
    assert content["alphas"] == [8, OWN]
    assert content["chosen"]["lora:alpha=8@2"] == 1e-2
    record = decode_comparison(content, tmp_path)
    assert record.comparison == grid
    assert json.loads(json.dumps(encode_comparison(record))) == content
    (tmp_path / "out" / "trials.sqlite3").unlink()
    done = len(calls)
    again = run.run_comparison(record.comparison, tmp_path / "out", command="x", log=lambda line: None)
    assert len(calls) == done
    assert again.chosen == record.chosen


def test_a_comparison_without_a_grid_is_continued_with_one(grid, tmp_path, calls):
    plain = dataclasses.replace(grid, contenders=(Contender("lora", 2), Contender("lora", 4)), alphas=())
    record = ComparisonRecord(plain, comparisons.run_all(plain), "x", "abc", comparisons.ENVIRONMENT)
    assert "alphas" not in encode_comparison(record)  # as it was before there were any
    (tmp_path / "out").mkdir()
    write_comparison(record, tmp_path / "out")
    wider = dataclasses.replace(plain, alphas=(OWN, 8.0))
    run.run_comparison(wider, tmp_path / "out", command="x", log=lambda line: None)
    tuned = {str(trial.contender) for trial in calls if trial.stage == "tune"}
    assert tuned == {"lora:alpha=8@2", "lora:alpha=16@4"}


def test_a_contender_that_names_its_alpha_keeps_to_it(grid):
    own = tuple(parse_contender(text, 2) for text in ("lora:alpha=1/2", "peft:LOHA:alpha=3", "peft:LOHA", "peft:OFT"))
    settings = dataclasses.replace(grid, contenders=own).settings
    assert [[str(each) for each in settings[c]] for c in own] == [
        ["lora:alpha=1@2", "lora:alpha=2@2"], ["peft:LOHA:alpha=3@2"], ["peft:LOHA:alpha=8@2", "peft:LOHA@2"],
        ["peft:OFT@2"],
    ]  # fmt: skip


def test_peft_defaults_are_not_taken_for_the_recipes_alpha(grid):
    """Without one in the recipe PEFT's own holds, whatever twice the rank is."""
    recipe = grid.recipe.model_copy(update={"method": grid.recipe.method.model_copy(update={"alpha": None})})
    own = (Contender("lora", 2), Contender("peft:LOHA", 2))
    settings = dataclasses.replace(grid, recipe=recipe, contenders=own, alphas=(4.0,)).settings
    assert [str(settings[c][0]) for c in own] == ["lora@2", "peft:LOHA:alpha=4@2"]


def test_values_of_unlike_types_stand_beside_each_other(grid, tmp_path, calls):
    mixed = (Contender("lora", 2), parse_contender("scalora-i:lipschitz=null/3", 2))
    comparison = dataclasses.replace(grid, contenders=mixed, alphas=())
    record = run.run_comparison(comparison, tmp_path / "out", command="x", log=lambda line: None)
    assert {str(t.contender) for t in record.results} == {
        "lora@2", "scalora-i:lipschitz=null@2", "scalora-i:lipschitz=3@2"
    }  # fmt: skip
    assert TrialQueue(tmp_path / "out", comparison).results().keys() == record.results.keys()


def test_what_has_several_settings_cannot_have_a_given_rate(grid):
    with pytest.raises(ScaloraError, match="lora@2 has several settings"):
        dataclasses.replace(grid, fixed={grid.contenders[0]: 1e-3})


def test_table_and_page_show_the_chosen_setting_and_the_rates_there(grid, tmp_path):
    chosen = {c: Chosen(grid.settings[c][-2 if len(grid.settings[c]) > 2 else 0], 1e-2) for c in grid.contenders}
    results = {trial: _result(grid, trial) for trial in [*grid.tuning(), *grid.final(chosen)]}
    table = comparison_table(grid, results)
    shown = {row[0]: row[1] for row in table.text("contender", "setting").rows}
    assert shown["lora@2"] == "alpha=8"
    assert shown["scalora:interval=5/10@2"] == "interval=10, alpha=8"
    assert shown["full@2"] == ""
    assert table.rows[0].validation == {1e-3: [pytest.approx(0.52)], 1e-2: [pytest.approx(0.62)]}
    write_report(ComparisonRecord(grid, results, "x", "abc", comparisons.ENVIRONMENT), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "on one grid, each at alpha 8, 4." in page
    assert "<td>scalora:interval=5/10@2</td><td>interval=5, alpha=4</td><td>0.01</td><td>0.6500</td>" in page


def test_compare_takes_grids_from_the_command_line(tmp_path, calls):
    recipe = workspace.lay(tmp_path)
    where = ["--set", "task.data.validation_size=10", "--output", str(tmp_path / "out"), "--no-curve"]
    methods = ["--methods", "lora,full,scalora:interval=5/10", "--lr", "1e-2", "--alpha", "8,32", "--seeds", "2"]
    methods.append("--no-ranks")
    result = CliRunner().invoke(app, ["compare", str(recipe), *methods, *where], terminal_width=200)
    assert result.exit_code == 0, result.output
    assert len({t.contender for t in calls if t.stage == "tune"}) == 2 + 1 + 4
    assert json.loads((tmp_path / "out" / "results.json").read_text())["ranks"] is False
    said = result.stdout.replace("\n", " ")
    assert "rank does not matter here" in said or "whether rank matters here is not known" in said
    assert "alpha=" in said
