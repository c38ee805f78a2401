"""Means and variances that normalisation layers gather as they train: a frozen base keeps its own."""

from __future__ import annotations

from collections.abc import Collection
from types import MethodType
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .heads import is_within


def hold_statistics(model: nn.Module, heads: Collection[str]) -> None:
    """Have layers that gather statistics (BatchNorm) use those of the base in training too, in place.

    No adapter holds them: what is saved would be another model than the one that was trained and scored.

    Args:
        model: a plain model that is not adapted yet.
        heads: names of the modules that are trained and saved as a whole, and gather their own.
    """
    for name, module in model.named_modules():
        if isinstance(module, _NormBase) and module.track_running_stats and not is_within(name, heads):
            module.eval()
            module.train = MethodType(_stay, module)  # a method of the instance, which a deep copy binds anew


def _stay(module: nn.Module, mode: bool = True) -> Any:
    """In place of ``train``."""
    return module
