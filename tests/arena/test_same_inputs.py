"""A comparison goes on with the data, tokenizer and base model that it began with, and with no others."""

import dataclasses
import json

import pytest

from helpers import comparisons, tokenized
from scalora import ScaloraError
from scalora.arena import run
from scalora.arena.plan import Trial
from scalora.arena.results import read_comparison
from scalora.arena.trial import check_recipe, run_trial


@pytest.fixture
def begun(tmp_path, monkeypatch):
    """A comparison with a seed still to run, and its folder."""
    monkeypatch.setattr(run, "write_report", lambda *arguments: None)
    monkeypatch.setattr(run, "run_trial", lambda c, t, *_: comparisons.fake_result(c, t))
    comparison = comparisons.small(tmp_path)
    inputs = run.check_comparison(comparison, tmp_path / "out", log=lambda line: None)
    run.run_comparison(comparison, tmp_path / "out", command="x", log=lambda line: None, inputs=inputs)
    return dataclasses.replace(comparison, seeds=(0, 1, 2)), tmp_path / "out"


def _flip(folder):
    rows = [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]
    tokenized.write_jsonl(folder / "data.jsonl", [{**row, "label": 1 - row["label"]} for row in rows])


def _another_base(folder):
    model = tokenized.llama()
    model.model.embed_tokens.weight.data += 0.5
    model.save_pretrained(folder / "llama")


def _another_tokenizer(folder):
    file = folder / "llama" / "tokenizer.json"
    file.write_text(file.read_text().replace('"cat"', '"tac"').replace('"dog"', '"cat"').replace('"tac"', '"dog"'))


CHANGES = {"the data of train": _flip, "the base model": _another_base, "the tokenizer": _another_tokenizer}


@pytest.mark.parametrize("clone", [False, True], ids=["here", "from results.json alone"])
@pytest.mark.parametrize("named", CHANGES)
def test_another_is_refused_by_name(begun, tmp_path, named, clone):
    comparison, folder = begun
    if clone:
        (folder / "trials.sqlite3").unlink()
    before = (folder / "results.json").read_text()
    CHANGES[named](tmp_path)
    with pytest.raises(ScaloraError, match=rf"^{named} .*of the comparison in .*choose another --output"):
        run.check_comparison(comparison, folder, log=lambda line: None)
    assert (folder / "results.json").read_text() == before


def test_the_same_go_on_in_silence(begun):
    comparison, folder = begun
    lines = []
    inputs = run.check_comparison(comparison, folder, log=lines.append)
    run.run_comparison(comparison, folder, command="x", log=lambda line: None, inputs=inputs)
    assert not lines
    assert read_comparison(folder).inputs == inputs
    assert len(read_comparison(folder).results) == 12 + 3


def test_a_comparison_of_before_goes_on_and_it_is_said(begun):
    comparison, folder = begun
    (folder / "trials.sqlite3").unlink()
    content = json.loads((folder / "results.json").read_text())
    del content["inputs"]
    (folder / "results.json").write_text(json.dumps(content))
    assert read_comparison(folder).inputs is None
    lines = []
    inputs = run.check_comparison(comparison, folder, log=lines.append)
    assert sum("does not say what it began with" in line for line in lines) == 1
    run.run_comparison(comparison, folder, command="x", log=lambda line: None, inputs=inputs)
    assert read_comparison(folder).inputs == inputs


def test_a_worker_with_other_data_takes_no_part(begun, tmp_path):
    """It looked before the other worker had begun."""
    comparison, folder = begun
    _flip(tmp_path)
    _, inputs = check_recipe(comparison.recipe)
    with pytest.raises(ScaloraError, match="the data of train"):
        run.run_comparison(comparison, folder, command="x", log=lambda line: None, inputs=inputs)


def test_a_trial_whose_data_changed_meanwhile_fails(tmp_path):
    comparison = comparisons.small(tmp_path)
    _, inputs = check_recipe(comparison.recipe)
    trial = Trial("tune", comparison.contenders[0], 1e-3, 0)
    assert "error" not in run_trial(comparison, trial, lambda: None, 60.0, inputs)
    _flip(tmp_path)
    assert "the data of train" in run_trial(comparison, trial, lambda: None, 60.0, inputs)["error"]
