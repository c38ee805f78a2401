"""How an optimizer's state moves along when columns of its parameters are rescaled, by :mod:`.optimizer_rules`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..common.errors import ScaloraError
from ..layers.sharding import local_shard, refuse_flattened_optimizer
from .optimizer_rules import state_rule
from .quantised_state import Blocks, quantised

_LOOPS = ("accelerate", "lightning", "pytorch_lightning")
_NO_MEAN = "exp_inf"  # follows the gradient, but is a maximum


def carry_state(optimizer: Optimizer, params: Sequence[Tensor], factors: Sequence[Tensor]) -> None:
    """Multiply gradients and state of ``params`` in place by ``factors`` to the power each entry asks for.

    What is quantised is read, multiplied and rounded once.

    Args:
        optimizer: one that :func:`state_rule` accepts.
        params: parameters whose gradients were rescaled.
        factors: per parameter, a tensor that broadcasts against this process's part of it (for A diag(α): β); all of
            one value where the optimizer's entries mix columns.

    Raises:
        ScaloraError: the state holds an entry without a known power.
    """
    rule = state_rule(optimizer, one_factor=True)
    by_power: dict[int, tuple[list[Tensor], list[Tensor]]] = {1: ([], []), 2: ([], [])}
    for param, factor in zip(params, factors, strict=True):
        state = {"gradient": param.grad, **optimizer.state.get(param, {})}
        for key, value in state.items():
            power = 1 if key == "gradient" else rule.powers.get(key, rule.mixed.get(key))
            if power is None:
                raise ScaloraError(
                    f"{type(optimizer).__name__} keeps an unknown state entry {key!r}: use AdamW from torch.optim"
                )
            if not power or value is None:
                continue
            multiplier = factor.reshape(-1)[:1] if key in rule.mixed else factor
            for blocks in quantised(state, key):
                blocks.scale_(multiplier**power)
            for tensor in _floats(value):
                by_power[power][0].append(local_shard(tensor))
                by_power[power][1].append(multiplier.to(tensor.device, tensor.dtype))
    for power, (tensors, multipliers) in by_power.items():
        for _ in range(power):
            if tensors:
                torch._foreach_mul_(tensors, multipliers)


@contextmanager
def gradient_moments(optimizer: Optimizer, params: Sequence[Tensor], power: int) -> Iterator[list[list[Tensor]]]:
    """What the optimizer keeps of each parameter that is a mean or sum of gradients to this power.

    Within, tensors of the parameter's shape that may be written to; what is quantised is rounded once at the end.

    Args:
        optimizer: one that :func:`state_rule` accepts.
        params: some of its parameters.
        power: 1, linear in the gradients, or 2, in their squares.
    """
    rule = state_rule(optimizer, one_factor=True)
    keys = [key for key, of_key in rule.powers.items() if of_key == power and key != _NO_MEAN]
    found: list[list[Tensor]] = []
    rounded: list[tuple[Blocks, Tensor]] = []
    for param in params:
        state, tensors = optimizer.state.get(param, {}), []
        for key in keys:
            if (value := state.get(key)) is None:
                continue
            if blocks := quantised(state, key):
                rounded += [(each, each.read()) for each in blocks]
                tensors += [values for _, values in rounded[-len(blocks) :]]
            else:
                tensors += value.unbind(0) if value.ndim > param.ndim else [value]  # AdEMAMix keeps two in one
        found.append(tensors)
    yield found
    for blocks, values in rounded:
        blocks.write(values)


def forget(optimizer: Optimizer, param: Tensor) -> None:
    """Let the state of one parameter start anew, step counter included."""
    state = optimizer.state.pop(param, {})
    if any(getattr(value, "is_paged", False) for value in state.values()):
        # bitsandbytes never frees paged memory: what was empty at first becomes empty again.
        for key, value in state.items():
            if not key.startswith("qmap"):
                state[key] = value.zero_() if isinstance(value, Tensor) else 0
        optimizer.state[param] = state


def innermost(optimizer: Any) -> Optimizer:
    """The torch optimizer inside accelerate's and similar wrappers; raises ScaloraError where there is none.

    A wrapper that is an optimizer of its own, as Lookahead is, stays: it does more than pass steps on.
    """
    refuse_flattened_optimizer(optimizer)
    while isinstance(getattr(optimizer, "optimizer", None), Optimizer) and _passes_on(optimizer):
        optimizer = optimizer.optimizer
    if not isinstance(optimizer, Optimizer):
        raise ScaloraError(
            f"optimizer is a {type(optimizer).__name__}: pass the torch optimizer that trains the adapters"
        )
    return optimizer


def _passes_on(wrapper: Any) -> bool:
    """Whether a wrapper leaves steps as they are: the loops' own, and whatever is no optimizer."""
    return not isinstance(wrapper, Optimizer) or type(wrapper).__module__.partition(".")[0] in _LOOPS


def _floats(value: Any) -> Iterator[Tensor]:
    """The tensors of an entry, which SOAP keeps in lists; those of few bits are not among them."""
    if isinstance(value, Tensor):
        if value.is_floating_point() and not hasattr(local_shard(value), "codes"):
            yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _floats(each)
