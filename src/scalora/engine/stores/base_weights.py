"""Differences added to the base weights in place, as in the paper; compensated where those are bf16 or fp16.

An increment of 1e-5 vanishes when it is added to a bf16 weight of 1e-2. What rounding takes away is therefore kept in a
second buffer of the weight's dtype and given back at the next event (Kahan), which costs that buffer's memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...common.errors import ScaloraError
from ...layers.fingerprint import fingerprint
from ...layers.peft_lora import AdapterLayer, is_dense, tied_weights
from ...layers.sharding import copy_into, gather_full, is_sharded, local_shard, shard_range
from .peft_model import carry
from .store import Move, Store, only_where

_LINE = 64  # bytes of a CPU's cache line
_CACHED = 2**18  # numbers of a product that is added before it leaves a CPU's cache


class BaseStore(Store):
    """Writes to the base weights.

    Raises:
        ScaloraError: a base weight is quantised, or serves elsewhere in the model too.
    """

    def __init__(self, model: nn.Module, layers: Sequence[AdapterLayer]) -> None:
        way_out = "choose accumulate='adapter', which never writes to the base"
        for layer in layers:
            if not is_dense(layer):
                raise ScaloraError(
                    f"accumulate='base' cannot add to layer {layer.name} ({type(layer.base).__name__}: quantised or "
                    f"not an ordinary matrix): {way_out}"
                )
        if tied := tied_weights(model, list(layers)):
            raise ScaloraError(
                f"accumulate='base' would change what shares the weight of layer {tied[0].name}: {way_out}"
            )
        self.lost: dict[str, Tensor] = {}
        for layer in layers:
            self._compensates(layer)
        self.layers = list(layers)
        carry(model, layers, None)
        for layer in layers:  # of an earlier run with the other store: it does not notice what is written here
            layer.module.kept_sum = None  # pyright: ignore[reportAttributeAccessIssue]

    def receive(self, moves: Sequence[Move], *, valid: Tensor | None = None, spare: int = 0) -> None:
        for layers, A, d, B in moves:
            self._add(layers, only_where(valid, A), d, only_where(valid, B))
        mark_written(self.layers)

    def exchange(self, old: Sequence[Move], new: Sequence[Move]) -> None:
        """Both at once: a weight is far larger than what is added to it, and read and written as a whole."""
        both = (
            Move(
                a.layers,
                torch.cat([a.A, b.A.to(a.A)], -1),
                torch.cat([a.d, -b.d.to(a.d)], -1),
                torch.cat([a.B, b.B.to(a.B)], -1),
            )
            for a, b in zip(old, new, strict=True)
        )
        self.receive(list(both))

    def _compensates(self, layer: AdapterLayer) -> bool:
        """Whether rounding is kept for this layer; asked anew each time, since a model may be cast in mid-run."""
        half = layer.base_weight.dtype in (torch.bfloat16, torch.float16)
        if half and layer.name not in self.lost:
            self.lost[layer.name] = torch.zeros_like(layer.base_weight)
        return half

    def _add(self, layers: Sequence[AdapterLayer], A: Tensor, d: Tensor, B: Tensor) -> None:
        working = torch.promote_types(A.dtype, torch.float32)
        count, moved = layers[0].experts, A.to(working) * d[:, None, :].to(working)
        each = (moved, B) if count == 1 else (moved.split(count), B.split(count))
        for layer, P, Q in zip(layers, *each, strict=True):
            spread = layer.base_weight.data
            if is_sharded(spread):
                P, Q = P[shard_range(spread, 0)], Q[shard_range(spread, 1)]
            weight, P = local_shard(spread), layer.scale * P
            if self._compensates(layer):
                lost = local_shard(self.lost[layer.name])
                if lost.shape != weight.shape:
                    raise ScaloraError(
                        f"layer {layer.name} was sharded after attach(), which accumulate='base' cannot follow where "
                        "the base is bf16 or fp16: shard the model first, then attach"
                    )
                exact = lost.float()
                _add_product(exact, P.float(), Q.float().mT)
                weight.copy_(exact.add_(weight))
                lost.copy_(exact.sub_(weight))
            else:
                _add_product(weight, P.to(weight.dtype), Q.to(weight.dtype).mT)

    def state_dict(self) -> dict[str, Any]:
        lost = dict(zip(self.lost, [t.clone() for t in gather_full(list(self.lost.values()))], strict=True))
        return {"lost": lost, "weights": self._weights()}

    def _weights(self) -> str:
        """What tells the written weights from those of another time; empty where they lie on many machines."""
        weights = {layer.name: layer.base_weight for layer in self.layers}
        return "" if any(map(is_sharded, weights.values())) else fingerprint(weights.items())

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if (now := self._weights()) and now != state.get("weights", now) != "":
            raise ScaloraError(
                "the base weights are not those of the saved run, to which accumulate='base' has added: load the "
                "model's own state of that time first (its checkpoint, or model.load_state_dict)"
            )
        # A run on a base of 32 bits has lost nothing.
        none = {name: torch.zeros(t.shape, dtype=t.dtype, device=t.device) for name, t in self.lost.items()}
        copy_into(list(self.lost.values()), [state["lost"].get(name, none[name]) for name in self.lost])
        mark_written(self.layers)


def _add_product(weight: Tensor, P: Tensor, Qt: Tensor) -> None:
    """weight += P Qt, of (m, n) or of one stack of experts (E, m, n)."""
    if not weight.is_cpu or weight.data_ptr() % _LINE == 0:
        (torch.addmm if weight.ndim == 2 else torch.baddbmm)(weight, P, Qt, out=weight)
        return
    # A loaded weight lies in memory as in its file, across cache lines. BLAS adds to such far more slowly than this.
    rows = max(1, _CACHED // weight.shape[-1])
    for some, factor in zip(weight.split(rows, -2), P.split(rows, -2), strict=True):
        some += factor @ Qt


def mark_written(layers: Sequence[AdapterLayer]) -> None:
    """From now on the base weights of these layers are no reference any more."""
    for layer in layers:
        layer.module.mark_written()  # pyright: ignore[reportAttributeAccessIssue]
