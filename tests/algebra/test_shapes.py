"""The shape checks of the tests are on in every module of the algebra: a wrong name would switch them off silently."""

import pkgutil
import sys

import pytest
import torch

import scalora.algebra
from scalora.algebra.lowrank import singular_values


def test_every_module_of_the_algebra_was_imported_by_the_hook():
    names = {f"scalora.algebra.{info.name}" for info in pkgutil.iter_modules(scalora.algebra.__path__)}
    checked = {name for name in names if "jaxtyping" in type(sys.modules[name].__spec__.loader).__module__}
    assert checked | {"scalora.algebra.precision"} == names  # which has no shapes


def test_a_wrong_shape_is_refused():
    with pytest.raises(Exception, match="Type-check"):
        singular_values(torch.ones(4, 2), torch.ones(5, 3))
