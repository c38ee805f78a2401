import pytest
import yaml

from scalora import ScaloraError
from scalora.runs.recipe import load_recipe, parse_recipe, read_value

GOOD = {
    "model": "somewhere/model",
    "task": {
        "kind": "multiple_choice", "data": {"train": "x.jsonl", "test_size": 5},
        "prompt": "{q}", "choices": [" a", " b"],
    },
    "method": {"name": "scalora-i", "rank": 4},
    "training": {"learning_rate": 1e-3},
    "output": "runs/x",
}  # fmt: skip


def _write(tmp_path, content):
    path = tmp_path / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def test_a_good_recipe_and_its_overrides(tmp_path):
    text = yaml.safe_dump(GOOD).replace("0.001", "1e-3")
    recipe = load_recipe(
        _write(tmp_path, text),
        ["training.learning_rate=5e-4", "method=lora", "task.data.train_size=7", "method.rank=2", "output=runs/y z"],
    )
    assert recipe.training["learning_rate"] == 5e-4
    assert (recipe.method.name, recipe.method.rank, recipe.method.scaled_alpha) == ("lora", 2, 4)
    assert recipe.task.data.train_size == 7
    assert recipe.output == "runs/y z"
    assert load_recipe(_write(tmp_path, text)).training["learning_rate"] == 1e-3
    # What is written beside the results is a recipe again, and the same one.
    assert parse_recipe(recipe.model_dump(mode="json")) == recipe


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"modle": "x"}, "unknown key 'modle'; did you mean 'model'"),
        ({"method": {"name": "lora", "rnak": 3}}, "unknown key 'method.rnak'; did you mean 'rank'"),
        ({"method": {"name": "lora", "rank": 0}}, "method.rank is 0"),
        ({"task": {**GOOD["task"], "promt": "x"}}, "promt'; did you mean 'prompt'"),
        ({"task": {**GOOD["task"], "data": {"trian": "x"}}}, "trian'; did you mean 'train'"),
        ({"task": {**GOOD["task"], "kind": "multiple"}}, "task.kind"),
        ({"task": {**GOOD["task"], "prompt": 3}}, "recipe.yaml: task.prompt is 3: "),
        ({"method": {"name": "lora", "target_modules": 3}}, "recipe.yaml: method.target_modules is 3: "),
        ({"task": {**GOOD["task"], "data": {"train": "x", "test_size": "5"}}}, "task.data.test_size is '5'"),
        ({"training": {"lerning_rate": 1}}, "lerning_rate'; did you mean 'learning_rate'"),
        ({"training": {"output_dir": "x"}}, "output_dir is decided by scalora"),
        ({"training": 3}, "training is 3"),
        ({"head_learning_rate": 0}, "head_learning_rate is 0"),
        ({"head_learning_rate": float("inf")}, "head_learning_rate is inf"),
        ({"output": None}, "output is empty: give it a value, or leave it out"),
        ({"output": "a\0b"}, r"recipe.yaml: output: 'a\\x00b' holds a null character"),
        ({"model": "a\0b"}, "recipe.yaml: model: 'a"),
        ({"task": {**GOOD["task"], "data": {"train": "a\0b"}}}, "task.data.train: 'a"),
        ({"task": {**GOOD["task"], "data": {"train": "x", "test": "a\0b"}}}, "task.data.test: 'a"),
        ({"task": {**GOOD["task"], "data": {"train": "x", "validation": "a\0b"}}}, "task.data.validation: 'a"),
        ({"task": {**GOOD["task"], "data": {"train": "x", "folder": "a\0b"}}}, "task.data.folder: 'a"),
    ],
)
def test_mistakes_are_named(tmp_path, change, words):
    with pytest.raises(ScaloraError, match=words):
        load_recipe(_write(tmp_path, {**GOOD, **change}))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "must be a mapping"),
        ("- a\n- b", "must be a mapping"),
        ("a: [1", "not valid YAML"),
        ("model: x", "missing"),
    ],
)
def test_files_that_are_no_recipe(tmp_path, content, words):
    with pytest.raises(ScaloraError, match=words):
        load_recipe(_write(tmp_path, content))


def test_missing_file_and_bad_overrides(tmp_path):
    with pytest.raises(ScaloraError, match="cannot be read"):
        load_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(ScaloraError, match="cannot be read"):
        load_recipe(tmp_path)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ScaloraError, match="UTF-8"):
        load_recipe(tmp_path / "binary.yaml")
    for override, words in (
        ("rank", "key=value"),
        ("=3", "key=value"),
        ("model.x=1", "has no parts"),
        ("output=[", "not valid"),
    ):
        with pytest.raises(ScaloraError, match=words):
            load_recipe(_write(tmp_path, GOOD), [override])


def test_half_a_character_is_no_path_and_no_text():
    with pytest.raises(ScaloraError, match=r"output: .*half a character"):
        parse_recipe({**GOOD, "output": "a\ud800b"})
    with pytest.raises(ScaloraError, match=r"the text .* of line 1 holds half a character"):
        read_value('{prompt: ["\\ud800"]}', ["task"])
    assert read_value('"\\U0001F600"') == "\U0001f600"
