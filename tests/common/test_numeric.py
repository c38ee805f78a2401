"""What is no number is not taken for one, in any section of a recipe."""

import pytest

from helpers import workspace
from scalora import ScaloraError
from scalora.methods import build_method
from scalora.runs.recipe import load_recipe

FIELDS = [
    "training.learning_rate", "training.max_steps", "training.seed", "training.warmup_steps", "method.rank",
    "method.alpha", "method.dropout", "task.max_length", "task.data.test_size", "task.data.seed",
    "task.data.max_characters", "score_batch_size", "head_learning_rate",
]  # fmt: skip


@pytest.mark.parametrize("value", ["true", "false", "'8'", "'1e-3'"])
@pytest.mark.parametrize("field", FIELDS)
def test_what_is_no_number_is_refused_by_the_fields_name(tmp_path, field, value):
    with pytest.raises(ScaloraError, match=rf"{field.rsplit('.')[-1]} is {value}, which is no number"):
        load_recipe(workspace.lay(tmp_path), [f"{field}={value}"])


@pytest.mark.parametrize("value", ["true", "'8'"])
@pytest.mark.parametrize("option", ["alpha-lora:every", "relora:every", "lora-ga:gamma"])
def test_so_are_the_options_of_methods(tmp_path, option, value):
    name, field = option.split(":")
    recipe = load_recipe(workspace.lay(tmp_path), [f"method={{name: {name}, options: {{{field}: {value}}}}}"])
    with pytest.raises(ScaloraError, match=rf"method\.options\.{field} is {value}, which is no number"):
        build_method(recipe.method)


@pytest.mark.parametrize("value", [".inf", ".nan", "-.inf"])
def test_alpha_is_finite(tmp_path, value):
    with pytest.raises(ScaloraError, match=r"method\.alpha is"):
        load_recipe(workspace.lay(tmp_path), [f"method.alpha={value}"])


def test_numbers_and_truth_values_stay(tmp_path):
    changes = ["method.rank=4.0", "training.learning_rate=1e-3", "method.alpha=8", "training.use_cpu=true"]
    recipe = load_recipe(workspace.lay(tmp_path), changes)
    assert (recipe.method.rank, recipe.training["learning_rate"], recipe.method.alpha) == (4, 1e-3, 8)
