"""Layers of one shape, stacked: what an event handles at once."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .adapters import AdapterLayer
from .scaling import Gram, gram_products
from .sharded import whole


class Group(NamedTuple):
    """Layers of one shape, dtype and device, with their positions among all layers."""

    members: list[int]
    layers: list[AdapterLayer]


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
    members: dict[Any, list[int]] = defaultdict(list)
    for i, layer in enumerate(layers):
        members[layer.A.shape, layer.Bt.shape, layer.A.dtype, layer.A.device].append(i)
    return [Group(index, [layers[i] for i in index]) for index in members.values()]


def gathered(layers: list[AdapterLayer]) -> Gathered:
    """Adapters and gradients of one group; what is sharded is gathered (a collective)."""
    params = [layer.A for layer in layers] + [layer.Bt for layer in layers]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    full, count = whole([*params, *gradients]), len(layers)
    A, Bt, grad_A, grad_Bt = (torch.stack(full[i : i + count]) for i in range(0, 4 * count, count))
    return Gathered(A, Bt.mT, grad_A, grad_Bt.mT)


def stacked(layers: list[AdapterLayer]) -> Stacked:
    """Adapters of one group and the products of adapters and gradients (a collective where they are sharded)."""
    now = gathered(layers)
    return Stacked(now.A, now.B, gram_products(*now))


def live_layers(layers: list[AdapterLayer], sound: Tensor) -> Tensor:
    """``sound`` (0-d) for each layer whose two matrices have a gradient, else False; (L), nothing waits for the device.

    A layer that was not used, or is frozen again, stays as it is.
    """
    no = torch.zeros_like(sound)
    used = (layer.A.grad is not None and layer.Bt.grad is not None for layer in layers)
    return torch.stack([sound if each else no for each in used])
