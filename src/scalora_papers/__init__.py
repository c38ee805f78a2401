"""The papers' figures and tables by name. Adding one means adding a file that lists it in ``EXPERIMENTS``."""

from __future__ import annotations

import pkgutil
from difflib import get_close_matches
from functools import cache
from importlib import import_module

from scalora.common.errors import ScaloraError

from .base import Experiment, Outcome, Scale, Setting

__all__ = ["Experiment", "Outcome", "Scale", "Setting", "all_experiments", "find_experiment"]


@cache
def all_experiments() -> dict[str, type[Experiment]]:
    """Every experiment by name, in the order of files and of their ``EXPERIMENTS``."""
    modules = (import_module(f".{info.name}", __name__) for info in pkgutil.iter_modules(__path__))
    return {each.name: each for module in modules for each in getattr(module, "EXPERIMENTS", ())}


def find_experiment(name: str) -> Experiment:
    """The experiment of that name; raises ScaloraError where there is none."""
    known = all_experiments()
    if name not in known:
        near = get_close_matches(name, known, n=1)
        raise ScaloraError(
            f"there is no experiment {name!r}: "
            + (f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}")
        )
    return known[name]()
