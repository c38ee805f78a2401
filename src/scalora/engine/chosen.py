"""Which layers a run rescales, and which it leaves as PEFT's plain LoRA."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

from peft.tuners.lora.layer import MultiheadAttention
from torch import nn

from ..common.errors import ScaloraError
from ..layers.exactness import is_bare
from ..layers.peft_lora import AdapterLayer, sort_layers
from .config import Unsupported

_UNSEEN = (
    "adapts a bare parameter, as experts and their routers are, of which refresh and coordinates='white' do not see "
    "what it is multiplied with: leave both out, or name other layers in target_modules and target_parameters"
)
_PASSED_BY = (
    "is part of torch's MultiheadAttention, which reads weights past their layers, so that refresh and "
    "coordinates='white' do not see what they are multiplied with: leave both out, or name other layers in "
    "target_modules"
)


def choose_layers(
    model: nn.Module, unsupported: Unsupported, *, sketched: bool = False
) -> tuple[list[AdapterLayer], dict[AdapterLayer, str]]:
    """The trained layers that are rescaled; those that are left, and why.

    Args:
        model: a PEFT LoRA model.
        unsupported: what becomes of layers that cannot be rescaled exactly.
        sketched: whether sketches of their inputs are needed too.

    Raises:
        ScaloraError: there is one and ``unsupported`` is "refuse", or there is no other; and as
            :func:`scalora.layers.peft_lora.sort_layers`.
    """
    layers, left = sort_layers(model)
    if sketched and (unseen := _unseen(model, layers)):
        layers, left = [layer for layer in layers if layer not in unseen], left | unseen
    for layer, why in left.items():
        if not layers:
            and_no_other = f"; unsupported={unsupported!r} has nothing to rescale" if unsupported == "leave" else ""
            raise ScaloraError(f"layer {layer.name} {why}{and_no_other}")
        if unsupported == "refuse":
            raise ScaloraError(
                f"layer {layer.name} {why}, or train such layers as PEFT's plain LoRA: unsupported='leave'"
            )
    return layers, left


def _unseen(model: nn.Module, layers: list[AdapterLayer]) -> dict[AdapterLayer, str]:
    """Layers of which sketches see no input, and why."""
    attention = [module for module in model.modules() if isinstance(module, MultiheadAttention)]
    passed_by = {inner for module in attention for inner in module.modules()}
    unseen = {layer: _PASSED_BY for layer in layers if layer.module in passed_by}
    return unseen | {layer: _UNSEEN for layer in layers if is_bare(layer.module)}


def warn_of_left(left: Mapping[str, str]) -> None:
    """Name, once a handle, the layers that are left, by the reason."""
    names: dict[str, list[str]] = {}
    for name, why in left.items():
        names.setdefault(why, []).append(name)
    for why, those in names.items():
        which = f"layers {', '.join(those)} train" if len(those) > 1 else f"layer {those[0]} trains"
        each = "each" if len(those) > 1 else "it"
        warnings.warn(f"{which} as PEFT's plain LoRA, since {each} {why.partition(':')[0]}", stacklevel=4)
