"""Layers of one shape, stacked: what an event handles at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..algebra.gram import Gram, gram_products
from ..algebra.whitening import Whitening
from ..layers.layout import as_columns, as_rows
from ..layers.peft_lora import AdapterLayer
from ..layers.sharding import gather_full, shard_of


class Group(NamedTuple):
    """Layers of one shape, dtype and device, and their two parameters; of L layers of E experts L·E members."""

    members: list[int]  # positions among all layers, each expert counted
    experts: int  # of each layer
    layers: list[AdapterLayer]
    A: list[Tensor]
    Bt: list[Tensor]


class Gathered(NamedTuple):
    """Adapters and gradients of one group, whole: (L·E, m, r) and (L·E, n, r); zeros where there is no gradient."""

    A: Tensor
    B: Tensor
    grad_A: Tensor
    grad_B: Tensor


class Stacked(NamedTuple):
    """Adapters of one group before the event, (L·E, m, r) and (L·E, n, r), and their Gram products."""

    A: Tensor
    B: Tensor
    gram: Gram


def grouped(layers: list[AdapterLayer]) -> list[Group]:
    """The layers by shape, dtype and device."""
    groups: dict[Any, Group] = {}
    first = 0
    for layer in layers:
        A, Bt, count = layer.A, layer.Bt, layer.experts
        group = groups.setdefault((A.shape, Bt.shape, A.dtype, A.device, count), Group([], count, [], [], []))
        group.members.extend(range(first, first + count))
        first += count
        group.layers.append(layer)
        group.A.append(A)
        group.Bt.append(Bt)
    return list(groups.values())


def gather_group(group: Group) -> Gathered:
    """Adapters and gradients of one group; what is sharded is gathered (a collective)."""
    params = [*group.A, *group.Bt]
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in params]
    full, count, E = gather_full([*params, *gradients]), len(group.A), group.experts
    A, Bt, grad_A, grad_Bt = (full[i : i + count] for i in range(0, 4 * count, count))
    A, grad_A = (torch.stack([as_columns(t, E) for t in some]) for some in (A, grad_A))
    Bt, grad_Bt = (torch.stack([as_rows(t, E) for t in some]) for some in (Bt, grad_Bt))
    return Gathered(*(each_member(t, E) for t in (A, Bt.mT, grad_A, grad_Bt.mT)))


def each_member(stacked: Tensor, experts: int) -> Tensor:
    """(L, E·m, k), as layers hold the columns of their experts, as (L·E, m, k)."""
    return stacked if experts == 1 else stacked.unflatten(1, (experts, -1)).flatten(0, 1)


def each_layer(stacked: Tensor, experts: int) -> Tensor:
    """The inverse of :func:`each_member`."""
    return stacked if experts == 1 else stacked.unflatten(0, (-1, experts)).flatten(1, 2)


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


def by_rank(stacks: Sequence[Stacked]) -> list[list[int]]:
    """Which of them have one rank, dtype and device: what is r×r of theirs is computed in one go."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for i, stack in enumerate(stacks):
        alike[stack.A.shape[-1], stack.A.dtype, stack.A.device].append(i)
    return list(alike.values())


def has_gradient(groups: Sequence[Group], finite: Tensor) -> Tensor:
    """``finite`` (0-d) for each member whose layer's two matrices have a gradient, else False: without waiting.

    A layer that was not used, or is frozen again, stays as it is.
    """
    used: list[bool] = []
    for group in groups:
        pairs = zip(group.A, group.Bt, strict=True)
        used += [A.grad is not None and Bt.grad is not None for A, Bt in pairs for _ in range(group.experts)]
    return finite & on_device(tuple(used), torch.bool, finite.device)


def per_parameter(group: Group, alpha: Tensor, beta: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Each parameter with the factors of its entries and those of its gradient's; α and β are (L·E, r).

    The gradient of A diag(α) is g_A diag(β), and the other way round (Lemmas 2 and 4). Factors are written out in the
    shape of what they multiply: torch multiplies lists in a few launches only where shapes agree.
    """
    (A, *_), (Bt, *_), E = group.A, group.Bt, group.experts
    pair = alpha.to(A.dtype), beta.to(A.dtype)
    columns, rows = (1,) + A.shape[1:2] + (1,) * (A.ndim - 2), Bt.shape[:1] + (1,) * (Bt.ndim - 1)
    # lora_B holds the first columns of all experts, then the second.
    by_column = pair if E == 1 else [f.unflatten(0, (-1, E)).mT.flatten(1) for f in pair]
    of_A = [f.view(-1, *columns).expand(-1, *A.shape).contiguous() for f in by_column]
    of_Bt = [f.view(-1, *rows).expand(-1, *Bt.shape).contiguous() for f in reversed(pair)]
    for params, factors in ((group.A, of_A), (group.Bt, of_Bt)):
        for p, own, of_gradient in zip(params, *factors, strict=True):
            yield p, shard_of(own, p), shard_of(of_gradient, p)


@lru_cache(maxsize=1024)
def on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Numbers as a tensor that nobody writes to, copied to the device once: a copy at each event would wait for it."""
    return torch.tensor(values, dtype=dtype, device=device)
