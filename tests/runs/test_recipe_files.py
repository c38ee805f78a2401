"""Every recipe that is shipped is valid."""

from pathlib import Path

import pytest

from scalora.runs.recipe import load_recipe

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_is_valid(path):
    from scalora.methods import build_method

    build_method(load_recipe(path).method)
