"""Sketches GΩ and GᵀQ of the gradient G of a frozen weight, at the cost of a LoRA adapter of k columns.

A probe is one more adapter whose product is zero: with C = 0 (m×k) the output x(ΩCᵀ) changes nothing, and autograd's
gradient of C is gᵀ(xΩ) = GΩ; with D = 0 (n×k) in x(DQᵀ) that of D is xᵀ(gQ) = GᵀQ. Micro-batches, autocast, activation
checkpointing and torch.compile are thereby autograd's business. Neither matrix is a parameter of the model: clipping,
the optimizer, DDP and checkpoints do not see them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from peft.tuners.lora import LoraLayer
from torch import Tensor
from torch.nn import functional

from .adapters import AdapterLayer
from .sharded import local

Side = Literal["left", "right"]  # which singular directions of G the sketch spans: of GΩ (m×k), or of GᵀQ (n×k)


class Probe(NamedTuple):
    """One more adapter: x ↦ (x B) Aᵀ, of which one matrix is zero and gathers a gradient."""

    A: Tensor  # (m, k)
    Bt: Tensor  # (k, n)

    def on(self, device: torch.device) -> Probe:
        """Where the layer computes; adapters may be kept elsewhere (CPU offloading)."""
        return Probe(self.A.to(device), self.Bt.to(device))

    def added_to(self, result: Tensor, x: Tensor) -> Tensor:
        """`result` plus the probe's output, which is zero."""
        A, Bt = self.on(x.device)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(Bt.dtype)
        return result + functional.linear(functional.linear(x, Bt), A).to(result.dtype)


class Probed(LoraLayer):
    """Put in front of a LoRA layer's class: the layer's own forward pass, and the probe's where there is one."""

    probe: Probe | None = None

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = super().forward(x, *args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        return result if self.probe is None or not torch.is_grad_enabled() else self.probe.added_to(result, x)


def make_probed(layer: AdapterLayer) -> None:
    """Let a layer take probes, by exchanging its module's class unless that knows them already."""
    cls = type(layer.module)
    if not hasattr(cls, "probe"):
        layer.module.__class__ = type(cls.__name__, (Probed, cls), {})


class Sketch:
    """Sums of one sketch per layer over the backward passes between :meth:`open` and :meth:`close`."""

    def __init__(self, layers: Sequence[AdapterLayer]) -> None:
        self.layers = layers
        self.side: Side | None = None
        self.sums: list[Tensor] = []  # float32 at least; (m, k) or (n, k)
        for layer in layers:
            make_probed(layer)

    def open(self, side: Side, fixed: Sequence[Tensor]) -> None:
        """Begin to gather GΩ (``"left"``, `fixed` holds Ω, n×k, of each layer) or GᵀQ (``"right"``, Q, m×k)."""
        self.side = side
        self.sums = []
        for layer, basis in zip(self.layers, fixed, strict=True):
            like, k = local(layer.A.detach()), basis.shape[1]
            m, n = layer.A.shape[0], layer.Bt.shape[1]
            basis = basis.to(like.dtype)
            if side == "left":
                probe = Probe(like.new_zeros(m, k, requires_grad=True), basis.mT.contiguous())
            else:
                probe = Probe(basis, like.new_zeros(k, n, requires_grad=True))
            self.sums.append(like.new_zeros(m if side == "left" else n, k, dtype=_wide(like)))
            layer.module.probe = probe  # pyright: ignore[reportAttributeAccessIssue]

    @torch.no_grad()
    def gather(self) -> None:
        """Add what the backward passes since the last call have left, on all processes: each then holds the same sums.

        Where a gradient overflowed the layer's share of this call is left out.
        """
        if self.side is None:
            return
        gains = [self._taken(layer) for layer in self.layers]
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            flat = torch.cat([gain.flatten() for gain in gains])
            dist.all_reduce(flat)
            gains = [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in gains]), gains, strict=True)]
        torch._foreach_add_(self.sums, gains)

    def _taken(self, layer: AdapterLayer) -> Tensor:
        probe: Probe = layer.module.probe  # pyright: ignore
        leaf = probe.A if self.side == "left" else probe.Bt
        grad, leaf.grad = leaf.grad, None
        gain = torch.zeros_like(leaf, dtype=_wide(leaf)) if grad is None else grad.to(_wide(leaf))
        gain = gain if self.side == "left" else gain.mT.contiguous()
        return torch.where(torch.isfinite(gain).all(), gain, 0.0)

    def close(self) -> list[Tensor]:
        """The sums; nothing is gathered any more."""
        sums, self.sums, self.side = self.sums, [], None
        for layer in self.layers:
            layer.module.probe = None  # pyright: ignore[reportAttributeAccessIssue]
        return sums

    def fixed(self) -> list[Tensor]:
        """What :meth:`open` was given, n×k or m×k for each layer; empty while closed."""
        if self.side is None:
            return []
        probes: list[Probe] = [layer.module.probe for layer in self.layers]  # pyright: ignore
        return [p.Bt.mT if self.side == "left" else p.A for p in probes]

    def state_dict(self) -> dict[str, Any]:
        names = [layer.name for layer in self.layers]
        parts = {"fixed": self.fixed(), "sums": self.sums}
        return {"side": self.side} | {
            part: {name: t.detach().clone() for name, t in zip(names, tensors, strict=False)}
            for part, tensors in parts.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["side"] is None:
            self.close()
            return
        self.open(state["side"], [state["fixed"][layer.name].to(layer.A.device) for layer in self.layers])
        for layer, total in zip(self.layers, self.sums, strict=True):
            total.copy_(state["sums"][layer.name])


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
