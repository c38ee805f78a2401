"""Whether all processes still hold bitwise the same: for tests, and for finding faults."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..common.errors import ScaloraError
from ..layers.peft_lora import AdapterLayer
from ..layers.sharding import differing, gather_full


def refuse_divergence(layers: Sequence[AdapterLayer], columns: bool, factors: Tensor) -> None:
    """Compare layers and factors with those of all other processes. A collective.

    Args:
        layers: their matrices, with what was moved out of them.
        columns: it lies in accumulated columns, else in the base weights.
        factors: constants and factors, in one tensor.

    Raises:
        ScaloraError: something differs; the message names it.
    """
    differ = set()
    for layer in layers:
        moved = [layer.accumulated.P, layer.accumulated.Qt] if columns else [layer.base_weight]
        if differing(gather_full([layer.A, layer.Bt, *moved])):
            differ.add(layer.name)
    if differing([factors]):
        differ.add("factors")
    if differ:
        raise ScaloraError(
            f"the processes have diverged in {', '.join(sorted(differ))}: start them from the same adapters, and "
            "let DDP or FSDP2 reduce every gradient before optimizer.step()"
        )
