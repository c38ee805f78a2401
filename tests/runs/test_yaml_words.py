"""Words of the data are taken as they were written; everything else is YAML."""

import pytest
import yaml

from scalora.common.errors import ScaloraError
from scalora.runs.recipe import load_recipe
from scalora.runs.yaml_words import load_yaml

WRITTEN = ["yes", "No", "on", "OFF", "true", "False", "012", "12:30", "2020-01-01", "~", "null", "1e3", "0.50", "0x1F"]
RECIPE = """
model: minilm-l6-v2
method: lora
output: out
config: {use_cache: no}
task:
  kind: classification
  text: text
  label: on
  regression: off
  labels: [%s]
  data: {train: x.csv, test: y.csv, columns: {on: yes}, values: {on: [yes, no, 3]}}
"""


@pytest.mark.parametrize("place", [("task", "labels"), ("task", "choices"), ("task", "data", "values", "label")])
def test_lists_of_words(place):
    text = f"[{', '.join(WRITTEN)}, 3, -1, 0, 'yes', ]"
    assert load_yaml(text, place) == [*WRITTEN, 3, -1, 0, "yes"]
    content = load_yaml(f"task: {{data: {{values: {{label: {text}}}}}, labels: {text}}}")
    assert content["task"]["labels"] == content["task"]["data"]["values"]["label"] == [*WRITTEN, 3, -1, 0, "yes"]
    assert load_yaml("- yes\n-\n", place) == ["yes", None]


def test_elsewhere_it_is_yaml():
    text = f"[{', '.join(WRITTEN)}]"
    assert load_yaml(text) == load_yaml(text, ("config", "x")) == [*yaml.safe_load(text)[:11], 1000.0, 0.5, 31]
    assert load_yaml("task: {regression: true, text_pair: null}") == {"task": {"regression": True, "text_pair": None}}
    assert load_yaml("") is None


def test_words_that_come_by_an_alias():
    content = load_yaml("common: &c {labels: [yes, no]}\ntask: {<<: *c, kind: classification}")
    assert content["task"] == {"labels": ["yes", "no"], "kind": "classification"}


def test_a_recipe(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE % "yes, no")
    recipe = load_recipe(path)
    task = recipe.task
    assert (task.labels, task.label, task.regression) == (["yes", "no"], "on", False)
    assert (task.data.columns, task.data.values) == ({"on": "yes"}, {"on": ["yes", "no", 3]})
    assert recipe.config == {"use_cache": False}
    assert load_recipe(path, ["task.labels=[no, off, 12:30]"]).task.labels == ["no", "off", "12:30"]
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(path).task == task


def test_a_recipe_that_nests_too_deep(tmp_path):
    path = tmp_path / "r.yaml"
    for text in ("task: &a [*a]", f"task: {'[' * 20_000}"):
        path.write_text(text)
        with pytest.raises(ScaloraError, match=r"r\.yaml is not valid YAML: its parts lie too deep"):
            load_recipe(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model: a\nmethod: lora\nmodel: b\n", "the key 'model' of line 1 is there again in line 3"),
        ("method:\n  rank: 8\n  name: lora\n  rank: 4\n", "the key 'rank' of line 2 is there again in line 4"),
        ("task:\n  data: {train: a, 'train': b}\n", "the key 'train' of line 2 is there again in line 2"),
        ("x: [{a: 1}, [{b: 1,\n b: 2}]]\n", "the key 'b' of line 1 is there again in line 2"),
        ("x: &x {a: 1, a: 2}\ny: {<<: *x}\n", "the key 'a' of line 1"),
        ("task: {values: {yes: [a], yes: [b]}}\n", "the key 'yes' of line 1"),
        ("x: {<<: {a: 1}, b: 1, b: 2}\n", "the key 'b' of line 1"),
    ],
)
def test_a_key_that_is_there_twice(tmp_path, text, words):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ScaloraError) as error:
        load_recipe(path)
    assert "r.yaml" in str(error.value)
    assert words in str(error.value)


def test_keys_that_are_merged_may_be_overridden():
    text = "a: &a {x: 1, y: [1]}\nb: &b {x: 2}\ntask: {<<: *a, x: 3}\nc: {<<: [*a, *b], z: *b}\nd: {y: 5, <<: *a}\n"
    assert load_yaml(text) == yaml.safe_load(text)
    assert load_yaml(text)["task"] == {"x": 3, "y": [1]}


def test_an_override_that_has_a_key_twice(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(RECIPE % "yes, no")
    with pytest.raises(ScaloraError, match=r"--set 'config=.*the key 'a' of line 1 is there again"):
        load_recipe(path, ["config={a: 1, a: 2}"])
