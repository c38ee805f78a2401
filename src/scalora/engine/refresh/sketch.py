"""Sketches GΩ and GᵀQ of the gradient G of a frozen weight, at the cost of a LoRA adapter of k columns.

A probe is one more adapter whose product is zero: with C = 0 (m×k) the output x(ΩCᵀ) changes nothing, and autograd's
gradient of C is gᵀ(xΩ) = GΩ; with D = 0 (n×k) in x(DQᵀ) that of D is xᵀ(gQ) = GᵀQ. Micro-batches, autocast, activation
checkpointing and torch.compile are thereby autograd's business; neither the zero product is formed nor what it would
pass back. Neither matrix is a parameter of the model: clipping, the optimizer, DDP and checkpoints do not see them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ...layers.lora_forward import make_probed
from ...layers.peft_lora import AdapterLayer
from ...layers.products import Adapter
from ...layers.sharding import local

Side = Literal["left", "right"]  # which singular directions of G the sketch spans: of GΩ (m×k), or of GᵀQ (n×k)


class Sketch:
    """Sums of one sketch per layer over the backward passes between :meth:`open` and :meth:`close`."""

    def __init__(self, layers: Sequence[AdapterLayer]) -> None:
        self.layers = layers
        self.side: Side | None = None
        self.sums: list[Tensor] = []  # over steps and processes; where there is one process, its leaves hold them
        for layer in layers:
            make_probed(layer)

    def open(self, side: Side, fixed: Sequence[Tensor]) -> None:
        """Begin to gather GΩ (``"left"``, `fixed` holds Ω, n×k, of each layer) or GᵀQ (``"right"``, Q, m×k)."""
        self.side = side
        for layer, basis in zip(self.layers, fixed, strict=True):
            like, k = local(layer.A.detach()), basis.shape[1]
            basis = basis.to(like.device, torch.promote_types(like.dtype, torch.float32))
            if side == "left":
                C = basis.new_zeros(layer.A.shape[0], k, requires_grad=True)
                probe = Adapter(basis.mT.contiguous(), C, zero="A")
            else:
                Dt = basis.new_zeros(k, layer.Bt.shape[1], requires_grad=True)
                probe = Adapter(Dt, basis, zero="Bt")
            layer.module.probe = probe  # pyright: ignore[reportAttributeAccessIssue]
        self.sums = [torch.zeros_like(leaf, requires_grad=False) for leaf in self._leaves()] if _several() else []

    @torch.no_grad()
    def gather(self) -> None:
        """To be called once a step: with several processes, each then holds the sum over all. A collective there."""
        if self.side is None or not _several():
            return
        gains = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self._leaves()]
        flat = torch.cat([gain.flatten() for gain in gains])
        dist.all_reduce(flat)
        torch._foreach_add_(
            self.sums, [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in gains]), gains, strict=True)]
        )
        for leaf in self._leaves():
            leaf.grad = None

    def close(self) -> list[Tensor]:
        """The sums (m×k or n×k), zero for a layer without gradient; nothing is gathered any more."""
        found = self._totals()
        found = [total if self.side == "left" else total.mT for total in found]
        for layer in self.layers:
            layer.module.probe = None  # pyright: ignore[reportAttributeAccessIssue]
        self.sums, self.side = [], None
        return found

    def fixed(self) -> list[Tensor]:
        """What :meth:`open` was given, n×k or m×k for each layer; empty while closed."""
        return [p.Bt.mT if self.side == "left" else p.A for p in self._probes()]

    def state_dict(self) -> dict[str, Any]:
        names = [layer.name for layer in self.layers]
        parts = {"fixed": self.fixed(), "sums": self._totals()}
        return {"side": self.side} | {
            part: {name: t.detach().clone() for name, t in zip(names, tensors, strict=False)}
            for part, tensors in parts.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["side"] is None:
            self.close()
            return
        self.open(state["side"], [state["fixed"][layer.name] for layer in self.layers])
        saved = [state["sums"][layer.name].to(leaf) for layer, leaf in zip(self.layers, self._leaves(), strict=True)]
        if self.sums:
            self.sums = saved
        else:
            for leaf, total in zip(self._leaves(), saved, strict=True):
                leaf.grad = total

    def _probes(self) -> list[Adapter]:
        return [] if self.side is None else [layer.module.probe for layer in self.layers]  # pyright: ignore

    def _leaves(self) -> list[Tensor]:
        return [p.A if self.side == "left" else p.Bt for p in self._probes()]

    def _totals(self) -> list[Tensor]:
        if self.sums:
            return self.sums
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self._leaves()]


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
