"""Differences kept as frozen columns beside the adapter's own; the base weights are never written.

Each layer holds ``capacity`` columns and room for a few events more. An event fills one slot of r columns; when none is
free, the sum is recompressed to ``capacity`` columns by a truncated SVD of its factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ...algebra.lowrank import truncate_all
from ...common.errors import ScaloraError
from ...layers.kept_sum import KeptSum
from ...layers.lora_forward import LoraForward
from ...layers.peft_lora import AdapterLayer
from ...layers.sharding import copy_into, gather_full, is_sharded
from ..groups import each_layer, each_member, on_device
from .peft_model import carry
from .store import Move, Store, only_where

SLOTS = 4  # events from one recompression to the next


class AdapterStore(Store):
    """The accumulated columns of a model's layers; made on first use, taken over where there are some.

    Args:
        model: holds the layers.
        layers: whose differences are taken.
        capacity: columns of each layer after a recompression; None: eight times its rank. Never more than the widest
            layer has singular values.
        kept: how layers keep the sum of weight and accumulated columns while they train; None: they do not.
    """

    def __init__(
        self, model: nn.Module, layers: Sequence[AdapterLayer], capacity: int | None, kept: KeptSum | None = None
    ) -> None:
        make_room(model, layers, capacity)
        for layer in layers:
            if isinstance(layer.module, LoraForward):
                layer.module.kept_sum = copy(kept)
        self.layers = list(layers)
        self.ranks = [layer.rank for layer in layers]
        self.capacities = _capacities(layers, capacity)
        device = layers[0].A.device
        self.discarded = torch.zeros(len(layers), device=device)  # squared norm lost so far, per layer
        self.total = torch.zeros(len(layers), device=device)  # squared norm at the last recompression

    @property
    def free(self) -> int:
        """Events that fit before the next recompression."""
        pairs = zip(self.layers, self.ranks, self.capacities, strict=True)
        return min((capacity + SLOTS * r - layer.accumulated.used) // r for layer, r, capacity in pairs)

    def receive(self, moves: Sequence[Move], *, valid: Tensor | None = None, spare: int = 0) -> None:
        if self.free < 1:
            # A recompression waits for the device anyway, so it may ask whether there is anything to make room for.
            if valid is not None and not bool(valid):
                return
            self.recompress()
        for layers, A, d, B in moves:
            self._add(layers, only_where(valid, A), d, only_where(valid, B))
        if self.free < spare:
            self.recompress()

    def _add(self, layers: Sequence[AdapterLayer], A: Tensor, d: Tensor, B: Tensor) -> None:
        held, experts = [layer.accumulated for layer in layers], layers[0].experts
        scaled = each_layer(A.to(held[0].P.dtype) * d[:, None, :].to(held[0].P.dtype), experts)
        transposed = each_layer(B, experts).mT
        before = [h.versions for h in held]
        copy_into([h.P for h in held], list(scaled), [(0, h.used) for h in held])
        copy_into([h.Qt for h in held], list(transposed), [(h.used, 0) for h in held])
        for h, versions in zip(held, before, strict=True):
            h.grown(A.shape[-1], versions)

    def discarded_share(self, like: Tensor) -> Tensor:
        share = torch.where(self.total > 0, self.discarded / self.total, 0.0)
        return share.sqrt().mean().to(like)

    @torch.no_grad()
    def recompress(self) -> None:
        """Recompress every layer to its capacity; the slots past it are free again."""
        order = sorted(range(len(self.layers)), key=self._shape)
        alike = [list(members) for _, members in groupby(order, key=self._shape)]
        products, settled = zip(*map(self._product, alike), strict=True)
        capacities = [self.capacities[index[0]] for index in alike]
        for index, best in zip(alike, truncate_all(products, capacities, settled), strict=True):
            held, experts = [self.layers[i].accumulated for i in index], self.layers[index[0]].experts
            pad = (0, held[0].room - best.P.shape[-1])
            P, Qt = each_layer(best.P, experts), each_layer(best.Q, experts).mT
            copy_into([h.P for h in held], list(nn.functional.pad(P, pad)))
            copy_into([h.Qt for h in held], list(nn.functional.pad(Qt, (0, 0, *pad))))
            for h in held:
                capacity = self.capacities[index[0]]
                # Where fewer columns are left, the next ones come among the first, and are orthogonal to none of them.
                h.settled, h.used, h.growth = h.used >= capacity, min(capacity, h.used), None
            there = on_device(tuple(index), torch.long, self.total.device)
            self.discarded[there] += _of_layers(best.discarded, experts).to(self.discarded)
            self.total[there] = _of_layers(best.total, experts).to(self.total)

    def _product(self, index: Sequence[int]) -> tuple[tuple[Tensor, Tensor], int]:
        """P and Q of layers of one shape, and of their experts, stacked; how many of the first columns are settled."""
        held, experts = [self.layers[i].accumulated for i in index], self.layers[index[0]].experts
        factors = gather_full([h.P.detach() for h in held] + [h.Qt.detach() for h in held])
        P, Q = torch.stack(factors[: len(index)]), torch.stack(factors[len(index) :]).mT
        # Rounded to half precision columns are no longer orthogonal; in float64 the saving would cost digits.
        settles = all(h.settled for h in held) and P.dtype == torch.float32
        return (each_member(P, experts), each_member(Q, experts)), self.capacities[index[0]] if settles else 0

    def _shape(self, i: int) -> tuple[int, ...]:
        held = self.layers[i].accumulated
        return (*held.P.shape, *held.Qt.shape, self.capacities[i], self.layers[i].experts)

    def state_dict(self) -> dict[str, Any]:
        """Counters; and the columns of a sharded model, whose own state dict may leave out what is frozen."""
        held = {layer.name: layer.accumulated for layer in self.layers}
        spread = {name: h for name, h in held.items() if is_sharded(h.P)}
        columns = gather_full([t.detach() for h in spread.values() for t in (h.P, h.Qt)])
        return {
            "discarded": self.discarded.clone(),
            "total": self.total.clone(),
            "used": {name: h.used for name, h in held.items()},
            "settled": {name: h.settled for name, h in held.items()},
            "came": {name: h.growth.columns if h.growth else () for name, h in held.items()},
            "P": dict(zip(spread, columns[::2], strict=True)),
            "Qt": dict(zip(spread, columns[1::2], strict=True)),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.discarded.copy_(state["discarded"])
        self.total.copy_(state["total"])
        for layer in self.layers:
            held, used = layer.accumulated, int(state["used"][layer.name])
            if layer.name in state["P"]:
                held.put(state["P"][layer.name], state["Qt"][layer.name])
            elif held.used != used and not is_sharded(held.P):
                raise ScaloraError(
                    f"layer {layer.name} has {held.used} accumulated columns, but the saved run had {used}: load the "
                    "model's own state of that time first (its adapter, or model.load_state_dict)"
                )
            held.used, held.settled = used, bool(state["settled"][layer.name])
            held.came(state.get("came", {}).get(layer.name, ()))  # older files do not say


def _of_layers(squares: Tensor, experts: int) -> Tensor:
    """Squared norms of all experts (L·E) as those of their layers (L)."""
    return squares if experts == 1 else squares.unflatten(0, (-1, experts)).sum(1)


def make_room(model: nn.Module, layers: Sequence[AdapterLayer], capacity: int | None, slots: int = SLOTS) -> None:
    """Let these layers carry ``capacity`` accumulated columns and ``slots`` times r more; those they have stay.

    With a capacity of 0 there is no room at all.
    """
    capacities = _capacities(layers, capacity)
    carry(model, layers, [k and k + slots * layer.rank for k, layer in zip(capacities, layers, strict=True)])


def _capacities(layers: Sequence[AdapterLayer], capacity: int | None) -> list[int]:
    """Of each layer; at most as many as the widest one has singular values, since none can use more."""
    # One limit for all: a narrow layer that is full earlier would let all be recompressed earlier.
    most = max(min(layer.shape) for layer in layers)
    return [min(8 * layer.rank if capacity is None else capacity, most) for layer in layers]
