"""A comparison keeps the precision that it was begun in."""

import json
from pathlib import Path

import pytest

from helpers import workspace
from scalora import ScaloraError
from scalora.arena.plan import Comparison, Contender, shared_parts
from scalora.arena.queue import TrialQueue
from scalora.arena.settle import settle_precision
from scalora.runs import precision
from scalora.runs.precision import PrecisionChoice
from scalora.runs.recipe import load_recipe, parse_recipe
from scalora.runs.stored import of_today

RECIPES = Path(__file__).parents[2] / "recipes"
RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def _comparison(folder, asked):
    recipe = load_recipe(workspace.lay(folder), ["task.data.validation_size=10", f"precision={asked}"])
    return Comparison(recipe, (Contender("lora", 2),), (1e-3,), (0,), (0,))


@pytest.fixture
def native(monkeypatch):
    """Sets what this machine would choose."""
    return lambda chosen: monkeypatch.setattr(
        precision, "choose", lambda device: PrecisionChoice(chosen, "as a test says")
    )


def test_it_is_decided_once(tmp_path, native):
    native("bfloat16")
    settled, choice = settle_precision(_comparison(tmp_path, "auto"), tmp_path / "out")
    assert settled.recipe.precision == choice.precision == "bfloat16"
    assert not (tmp_path / "out").exists()
    TrialQueue(tmp_path / "out", settled)
    native("float32")
    again, choice = settle_precision(_comparison(tmp_path, "auto"), tmp_path / "out")
    assert again.recipe.precision == "bfloat16"
    assert choice.reason == "as what is continued"
    TrialQueue(tmp_path / "out", again)
    trial = again.tuning()[0]
    assert again.trial_recipe(trial, "x").precision == "bfloat16"


def test_another_is_refused(tmp_path):
    TrialQueue(tmp_path / "out", _comparison(tmp_path, "bfloat16"))
    ordered, _ = settle_precision(_comparison(tmp_path, "float32"), tmp_path / "out")
    with pytest.raises(ScaloraError, match=r"another precision \(bfloat16, not float32\): choose another --output"):
        TrialQueue(tmp_path / "out", ordered)


def test_results_alone_are_enough(tmp_path, native):
    native("float32")
    recipe = _comparison(tmp_path, "float32").recipe.model_dump(mode="json")
    del recipe["precision"]
    (tmp_path / "results.json").write_text(json.dumps({"recipe": {**recipe, "training": {"bf16": True}}}))
    settled, _ = settle_precision(_comparison(tmp_path, "auto"), tmp_path)
    assert settled.recipe.precision == "bfloat16"


@pytest.mark.parametrize("folder", ["minilm-sarcasm", "smollm2-arc-easy", "smollm2-gsm8k", "digits"])
@pytest.mark.parametrize("here", ["bfloat16", "float32"])
def test_what_is_committed_can_be_continued_on_any_machine(folder, here, native):
    """With the packaged recipe, which says auto where the stored one had training.bf16."""
    native(here)
    stored = json.loads((RESULTS / folder / "results.json").read_text())["recipe"]
    # Where the data lie may have changed since; everything else is the packaged recipe's.
    recipe = load_recipe(RECIPES / f"{folder}.yaml", ["task.data.validation_size=10"])
    settled, _ = settle_precision(Comparison(recipe, (Contender("lora", 2),), (1e-3,), (0,), (0,)), RESULTS / folder)
    mine, theirs = (shared_parts(each) for each in (settled.recipe, parse_recipe(of_today(stored))))
    assert mine["precision"] == theirs["precision"] == ("float32" if folder == "digits" else "bfloat16")
    assert mine["training"] == theirs["training"]
