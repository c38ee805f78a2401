"""c of the paper, per layer: given by a Lipschitz constant, or to be calibrated at the first event."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..common.errors import ScaloraError
from ..layers.peft_lora import AdapterLayer


def initial_constants(optimizer: Optimizer, layers: list[AdapterLayer], lipschitz: float | None) -> Tensor:
    """c/s² per layer, of experts for each, float64: 1/(L·lr·s²), or NaN where it is still to be calibrated.

    Raises:
        ScaloraError: L is given, and the two matrices of a layer have not one positive learning rate.
    """
    device = layers[0].A.device
    if lipschitz is None:
        return torch.full((sum(layer.experts for layer in layers),), torch.nan, dtype=torch.float64, device=device)
    rates = {id(p): float(g.get("initial_lr", g["lr"]) or 0) for g in optimizer.param_groups for p in g["params"]}
    for layer in layers:
        pair = rates[id(layer.A)], rates[id(layer.Bt)]
        if pair[0] != pair[1] or pair[0] <= 0:
            raise ScaloraError(
                f"lipschitz={lipschitz} needs one positive learning rate for both matrices of a layer, but "
                f"{layer.name} has {pair[0]} and {pair[1]}: use lipschitz=None, which calibrates c"
            )
    values = [1 / (lipschitz * rates[id(each.A)] * each.scale**2) for each in layers for _ in range(each.experts)]
    return torch.tensor(values, dtype=torch.float64, device=device)
