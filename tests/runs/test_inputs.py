"""A run goes on with what it began with: data, tokenizer and base model."""

import json
import random

import pytest

from helpers import tokenized, workspace
from scalora import ScaloraError
from scalora.runs.inputs import Inputs
from scalora.runs.loading import load_inputs
from scalora.runs.recipe import load_recipe
from scalora.runs.training import Watcher, train

METHODS = ["lora", "scalora"]


class Lines(Watcher):
    def __init__(self):
        self.lines = []

    def say(self, text):
        self.lines.append(text)


@pytest.fixture(params=METHODS)
def begun(request, tmp_path):
    """A folder with a recipe, overrides, and a run of it that lacks its end."""
    options = [f"method={{name: {request.param}, rank: 2}}", "task.data.validation_size=10", "training.max_steps=4"]
    recipe = load_recipe(workspace.lay(tmp_path), options)
    train(recipe, ranks=False)
    (tmp_path / "run" / "metrics.json").unlink()
    return tmp_path, recipe


def _rows(folder):
    return [json.loads(line) for line in (folder / "data.jsonl").read_text().splitlines()]


EDITS = {
    "flipped": lambda rows: [{**row, "label": 1 - row["label"]} for row in rows],
    "shuffled": lambda rows: random.Random(1).sample(rows, len(rows)),
    "halved": lambda rows: rows[:40],
    "edited": lambda rows: [*rows[:-1], {**rows[-1], "text": "the cat"}],
}


def test_the_same_data_in_another_form_go_on(begun):
    folder, recipe = begun
    rows = [{"unused": 1, **row} for row in _rows(folder)]
    tokenized.write_jsonl(folder / "data.jsonl", rows)
    watcher = Lines()
    result = train(recipe, resume=True, ranks=False, watcher=watcher)
    assert result.metrics["inputs"] == json.loads((folder / "run" / "inputs.json").read_text())
    assert not any("inputs.json" in line for line in watcher.lines)


@pytest.mark.parametrize("edit", EDITS)
def test_other_data_are_refused(begun, edit):
    folder, recipe = begun
    before = (folder / "run" / "inputs.json").read_text()
    tokenized.write_jsonl(folder / "data.jsonl", EDITS[edit](_rows(folder)))
    with pytest.raises(ScaloraError, match=r"the data of \w+ are others than .*run' \(\d+ rows.*start anew") as refused:
        train(recipe, resume=True, ranks=False)
    assert not {"tokenizer", "base model"} & set(str(refused.value).split(" is another"))
    assert (folder / "run" / "inputs.json").read_text() == before


def test_another_tokenizer_is_refused(begun):
    folder, recipe = begun
    file = folder / "llama" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["cat"], vocabulary["dog"] = vocabulary["dog"], vocabulary["cat"]
    file.write_text(json.dumps(content))
    with pytest.raises(ScaloraError, match=r"^the tokenizer is another than that of the run"):
        train(recipe, resume=True, ranks=False)


def test_another_base_model_is_refused(begun):
    folder, recipe = begun
    model = tokenized.llama()
    model.model.embed_tokens.weight.data += 0.5
    model.save_pretrained(folder / "llama")
    with pytest.raises(ScaloraError, match=r"^the base model is another than that of the run .*fingerprint"):
        train(recipe, resume=True, ranks=False)


def test_a_run_of_before_goes_on_and_it_is_said(begun):
    folder, recipe = begun
    (folder / "run" / "inputs.json").unlink()
    watcher = Lines()
    train(recipe, resume=True, ranks=False, watcher=watcher)
    assert sum("inputs.json is not there" in line for line in watcher.lines) == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"data": 3}'])
def test_digests_that_cannot_be_read_are_refused(begun, content):
    folder, recipe = begun
    (folder / "run" / "inputs.json").write_text(content)
    with pytest.raises(ScaloraError, match="no readable digests"):
        train(recipe, resume=True, ranks=False)


def test_what_a_tokenizer_does_before_its_vocabulary_counts_too(tmp_path):
    recipe = load_recipe(workspace.lay(tmp_path))
    before = Inputs.of(load_inputs(recipe))
    file = tmp_path / "llama" / "tokenizer.json"
    content = json.loads(file.read_text())
    file.write_text(
        json.dumps({**content, "normalizer": {"type": "Replace", "pattern": {"String": "cat"}, "content": "dog"}})
    )
    after = Inputs.of(load_inputs(recipe))
    assert (after.data, after.base_model) == (before.data, before.base_model)
    assert after.tokenizer != before.tokenizer
