"""Layers of one shape, stacked: what an event handles at once."""

from __future__ import annotations

from collections import defaultdict
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..algebra.gram import Gram, gram_products
from ..layers.peft_lora import AdapterLayer
from ..layers.sharding import whole


class Group(NamedTuple):
    """Layers of one shape, dtype and device, their positions among all layers, and their two parameters."""

    members: list[int]
    layers: list[AdapterLayer]
    A: list[Tensor]
    Bt: list[Tensor]


class Gathered(NamedTuple):
    """Adapters and gradients of one group, whole: (L, m, r) and (L, n, r); zeros where there is no gradient."""

    A: Tensor
    B: Tensor
    grad_A: Tensor
    grad_B: Tensor


class Stacked(NamedTuple):
    """Adapters of one group before the event, (L, m, r) and (L, n, r), and their Gram products."""

    A: Tensor
    B: Tensor
    gram: Gram


def grouped(layers: list[AdapterLayer]) -> list[Group]:
    """The layers by shape, dtype and device."""
    groups: dict[Any, Group] = defaultdict(lambda: Group([], [], [], []))
    for i, layer in enumerate(layers):
        A, Bt = layer.A, layer.Bt
        group = groups[A.shape, Bt.shape, A.dtype, A.device]
        group.members.append(i)
        group.layers.append(layer)
        group.A.append(A)
        group.Bt.append(Bt)
    return list(groups.values())


def gathered(group: Group) -> Gathered:
    """Adapters and gradients of one group; what is sharded is gathered (a collective)."""
    params = [*group.A, *group.Bt]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    full, count = whole([*params, *gradients]), len(group.A)
    A, Bt, grad_A, grad_Bt = (torch.stack(full[i : i + count]) for i in range(0, 4 * count, count))
    return Gathered(A, Bt.mT, grad_A, grad_Bt.mT)


def stacked(group: Group) -> Stacked:
    """Adapters of one group and the products of adapters and gradients (a collective where they are sharded)."""
    now = gathered(group)
    return Stacked(now.A, now.B, gram_products(*now))


def live_layers(group: Group, sound: Tensor) -> Tensor:
    """``sound`` (0-d) for each layer whose two matrices have a gradient, else False; (L), nothing waits for the device.

    A layer that was not used, or is frozen again, stays as it is.
    """
    no = torch.zeros_like(sound)
    used = (A.grad is not None and Bt.grad is not None for A, Bt in zip(group.A, group.Bt, strict=True))
    return torch.stack([sound if each else no for each in used])


@lru_cache(maxsize=1024)
def on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor that nobody writes to, copied to the device once: a copy at each event would wait for it."""
    return torch.tensor(values, dtype=dtype, device=device)
