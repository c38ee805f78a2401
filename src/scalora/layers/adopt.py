"""One verb for the classes of live modules: put a class of ours in front of a module's own, as FSDP2 does with its."""

from __future__ import annotations

from functools import cache
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M", bound=nn.Module)


def adopt(module: nn.Module, mixin: type[M]) -> M:
    """Let a module behave as ``mixin`` says, whose ``super()`` is the module's own class.

    Parameters, hooks and names stay; copies and pickles of the module keep the mixin. A second call changes nothing.
    """
    if not isinstance(module, mixin):
        module.__class__ = _joined(mixin, type(module))
    assert isinstance(module, mixin)
    return module


@cache
def _joined(mixin: type, cls: type) -> type:
    def reduce(self: Any, protocol: Any) -> Any:
        # A class that is made at run time cannot be found by its name: pickles say how to make it again.
        _, _, *rest = super(joined, self).__reduce_ex__(protocol)
        return (_empty, (mixin, cls), *rest)

    own = {"__reduce_ex__": reduce, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
    joined = type(cls.__name__, (mixin, cls), own)
    return joined


def _empty(mixin: type, cls: type) -> Any:
    return object.__new__(_joined(mixin, cls))
