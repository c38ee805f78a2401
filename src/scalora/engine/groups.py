"""Layers of one shape, stacked: what an event handles at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..algebra.gram import Gram, gram_products
from ..algebra.whitening import Whitening
from ..layers.layout import as_matrix
from ..layers.peft_lora import AdapterLayer
from ..layers.sharding import gather_full, shard_of


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


def gather_group(group: Group) -> Gathered:
    """Adapters and gradients of one group; what is sharded is gathered (a collective)."""
    params = [*group.A, *group.Bt]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    full, count = [as_matrix(t) for t in gather_full([*params, *gradients])], len(group.A)
    A, Bt, grad_A, grad_Bt = (torch.stack(full[i : i + count]) for i in range(0, 4 * count, count))
    return Gathered(A, Bt.mT, grad_A, grad_Bt.mT)


def stack_with_gram(group: Group, coordinates: tuple[Whitening, Whitening] | None = None) -> Stacked:
    """Adapters of one group and the products of adapters and gradients (a collective where they are sharded).

    Args:
        group: of L layers.
        coordinates: of A and of B, stacked, that the gradients belong to; None: they are of A and B as they are.
    """
    now = gather_group(group)
    A, B = now.A, now.B
    if coordinates:
        A, B = (side.color(X.to(side.U)) for side, X in zip(coordinates, (A, B), strict=True))
    return Stacked(now.A, now.B, gram_products(A, B, now.grad_A, now.grad_B))


def has_gradient(group: Group, finite: Tensor) -> Tensor:
    """``finite`` (0-d) for each layer whose two matrices have a gradient, else False: (L), without waiting.

    A layer that was not used, or is frozen again, stays as it is.
    """
    no = torch.zeros_like(finite)
    used = (A.grad is not None and Bt.grad is not None for A, Bt in zip(group.A, group.Bt, strict=True))
    return torch.stack([finite if each else no for each in used])


def per_parameter(group: Group, alpha: Tensor, beta: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each parameter with the factor of its columns and that of its gradient; α and β are (L, r).

    The gradient of A diag(α) is g_A diag(β), and the other way round (Lemmas 2 and 4).
    """
    dtype = group.A[0].dtype
    for A, Bt, a, b in zip(group.A, group.Bt, alpha.to(dtype), beta.to(dtype), strict=True):
        patch = (1,) * (A.ndim - 2)  # of a convolution
        yield A, a.view(-1, *patch), b.view(-1, *patch)
        yield Bt, shard_of(b.view(-1, 1, *patch), Bt), shard_of(a.view(-1, 1, *patch), Bt)


@lru_cache(maxsize=1024)
def on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor that nobody writes to, copied to the device once: a copy at each event would wait for it."""
    return torch.tensor(values, dtype=dtype, device=device)
