"""How the state of an optimizer moves along when the columns of its parameters are rescaled.

The gradient of Ã = A diag(α) is G B̃ = g_A diag(β): what was gathered from gradients to the power p is multiplied by
βᵖ (state of A) or αᵖ (state of B); step counters stay. Source: arXiv 2510.23818, Lemmas 2 and 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..common.errors import ScaloraError
from ..layers.sharding import local_shard, refuse_flattened_optimizer

# Class → {state key: power of the gradient it holds}. Exact classes only: a subclass may mean something else.
_POWERS: Mapping[type[Optimizer], Mapping[str, int]] = {
    torch.optim.SGD: {"momentum_buffer": 1},
    torch.optim.Adam: {"step": 0, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2},
    torch.optim.AdamW: {"step": 0, "exp_avg": 1, "exp_avg_sq": 2, "max_exp_avg_sq": 2},
    torch.optim.NAdam: {"step": 0, "mu_product": 0, "exp_avg": 1, "exp_avg_sq": 2},
    torch.optim.RAdam: {"step": 0, "exp_avg": 1, "exp_avg_sq": 2},
    torch.optim.Adamax: {"step": 0, "exp_avg": 1, "exp_inf": 1},
    # The momentum of RMSprop and Adadelta's acc_delta gather g/√v and its like: no power of g is left in them.
    torch.optim.RMSprop: {"step": 0, "square_avg": 2, "grad_avg": 1, "momentum_buffer": 0},
    torch.optim.Adadelta: {"step": 0, "square_avg": 2, "acc_delta": 0},
    torch.optim.Adagrad: {"step": 0, "sum": 2},
    torch.optim.Rprop: {"step": 0, "prev": 1, "step_size": 0},
}
_WAY_OUT = f"use one of {', '.join(cls.__name__ for cls in _POWERS)} from torch.optim"


def state_powers(optimizer: Optimizer) -> Mapping[str, int]:
    """The power of the gradient in each entry of this optimizer's state.

    Raises:
        ScaloraError: the class has no exact rule (factored, quantised, matrix-valued or unknown state), or its
            weight decay is mixed into the moments, where it does not scale with the gradient.
    """
    powers = _POWERS.get(type(optimizer))
    if powers is None:
        cls = type(optimizer)
        raise ScaloraError(
            f"optimizer is {cls.__module__}.{cls.__qualname__}: no exact rule is known for carrying its state along; "
            f"{_WAY_OUT}"
        )
    for group in optimizer.param_groups:
        decoupled = isinstance(optimizer, torch.optim.AdamW) or group.get("decoupled_weight_decay", False)
        if group.get("weight_decay", 0) and not decoupled:
            raise ScaloraError(
                f"{type(optimizer).__name__} has weight_decay={group['weight_decay']}, which it adds to the gradient: "
                "its state then cannot be carried along exactly; use AdamW (decoupled decay) or weight_decay=0"
            )
    return powers


def carry_state(optimizer: Optimizer, params: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """Multiply gradients and state of ``params`` in place by ``factors`` to the power each entry asks for.

    Args:
        optimizer: one that :func:`state_powers` accepts.
        params: parameters whose gradients were rescaled.
        factors: per parameter, a tensor that broadcasts against this process's part of it (for A diag(α): β).

    Raises:
        ScaloraError: the state holds an entry without a known power.
    """
    powers = state_powers(optimizer)
    by_power: dict[int, tuple[list[Tensor], list[Tensor]]] = {1: ([], []), 2: ([], [])}
    for param, factor in zip(params, factors, strict=True):
        entries = {**optimizer.state.get(param, {}), "gradient": param.grad}
        for key, value in entries.items():
            power = 1 if key == "gradient" else powers.get(key)
            if power is None:
                raise ScaloraError(f"{type(optimizer).__name__} keeps an unknown state entry {key!r}: {_WAY_OUT}")
            if power and value is not None:
                tensors, multipliers = by_power[power]
                tensors.append(local_shard(value))
                multipliers.append(factor.to(value.dtype))
    for power, (tensors, multipliers) in by_power.items():
        for _ in range(power):
            if tensors:
                torch._foreach_mul_(tensors, multipliers)


def linear_state(optimizer: Optimizer, param: Tensor) -> list[Tensor]:
    """What the optimizer keeps of a parameter that is a linear function of its gradients: means and sums of them."""
    powers = state_powers(optimizer)
    entries = optimizer.state.get(param, {}).items()
    return [value for key, value in entries if powers.get(key) == 1 and key != "exp_inf" and value is not None]


def innermost(optimizer: Any) -> Optimizer:
    """The torch optimizer inside accelerate's and similar wrappers; raises ScaloraError where there is none."""
    refuse_flattened_optimizer(optimizer)
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer):  # accelerate's and similar wrappers
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise ScaloraError(
            f"optimizer is a {type(optimizer).__name__}: pass the torch optimizer that trains the adapters"
        )
    return optimizer
