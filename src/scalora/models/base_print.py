"""The fingerprint of a base model: so that what stands on one is seen to be put on the same."""

from __future__ import annotations

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..layers.fingerprint import fingerprint
from .origin import origin
from .packed import is_packed


def backbone_fingerprint(model: nn.Module, *, linear: bool = True) -> str:
    """The fingerprint of a base model: its class of config and its backbone (`model.base_model`).

    A classification head may have started at random and does not count, nor does a pooler that has. Without `linear`
    the weights of linear layers do not count either.
    """
    backbone, random = getattr(model, "base_model", model), origin(model).random
    skipped = {id(parameter) for name, parameter in model.named_parameters() if name in random}
    if not linear:
        skipped |= {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | Conv1D)}
    kept = ((name, parameter) for name, parameter in backbone.named_parameters() if id(parameter) not in skipped)
    return fingerprint(kept, type(getattr(model, "config", None)).__name__)


def fingerprint_as(model: nn.Module, quantization: str) -> str:
    """The fingerprint of a base model that is loaded and yet to be rounded, with what it is rounded to.

    Packed, and as it was before, it has one and the same: of all but its linear weights, whose values packing changes.
    """
    if is_packed(quantization):
        return f"{backbone_fingerprint(model, linear=False)}-packed-{quantization}"
    return backbone_fingerprint(model) + {"none": "", "nf4-rounded": "-nf4"}[quantization]
