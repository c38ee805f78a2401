"""The methods of the family by name. Adding one means adding a file that lists it in ``METHODS``.

What PEFT has beside them is named ``peft:<TYPE>``.
"""

from __future__ import annotations

import pkgutil
from difflib import get_close_matches
from functools import cache
from importlib import import_module

from ..common.errors import ScaloraError
from .method import Adapted, Family, Method, MethodSpec, Spectrum
from .peft_any import PEFT_PREFIX, peft_method

__all__ = ["Adapted", "Family", "Method", "MethodSpec", "Spectrum", "all_methods", "build_method", "method_class"]


@cache
def all_methods() -> dict[str, type[Method]]:
    """Every method by name, one family after another; within each in the order of files and of their ``METHODS``."""
    modules = (import_module(f".{info.name}", __name__) for info in pkgutil.iter_modules(__path__))
    found = [method for module in modules for method in getattr(module, "METHODS", ())]
    return {method.name: method for family in Family for method in found if method.family is family}


def build_method(spec: MethodSpec) -> Method:
    """The method a recipe names.

    Raises:
        ScaloraError: there is none of that name, or an option is wrong.
    """
    return method_class(spec.name)(spec)


def method_class(name: str) -> type[Method]:
    """The class of a method, by the name that a recipe gives it.

    Raises:
        ScaloraError: there is none of that name.
    """
    if name.lower().startswith(PEFT_PREFIX):
        return peft_method(name)
    known = all_methods()
    if name not in known:
        near = get_close_matches(name, known, n=1, cutoff=0.7)
        hint = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)} or {PEFT_PREFIX}<TYPE>"
        raise ScaloraError(f"method.name is {name!r}: {hint}")
    return known[name]
