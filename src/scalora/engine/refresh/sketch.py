"""Sketches GΩ and GᵀQ of every layer's gradient, summed over steps and processes (:mod:`layers.gradient_sketch`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ...layers.adopt import adopt
from ...layers.gradient_sketch import GradientSketch, Side
from ...layers.lora_forward import LoraForward
from ...layers.peft_lora import AdapterLayer
from ...layers.sharding import local_shard


class Sketch:
    """Sums of one sketch per layer over the backward passes between :meth:`open` and :meth:`close`."""

    def __init__(self, layers: Sequence[AdapterLayer]) -> None:
        self.layers = layers
        self.side: Side | None = None
        self.sums: list[Tensor] = []  # over steps and processes; where there is one process, its leaves hold them
        self._modules = [adopt(layer.module, LoraForward) for layer in layers]  # pyright: ignore[reportArgumentType]

    def open(self, side: Side, fixed: Sequence[Tensor]) -> None:
        """Begin to gather GΩ (``"left"``, `fixed` holds Ω, n×k, of each layer) or GᵀQ (``"right"``, Q, m×k)."""
        self.side = side
        for layer, module, basis in zip(self.layers, self._modules, fixed, strict=True):
            like, k = local_shard(layer.A.detach()), basis.shape[1]
            # Contiguous, as it is after a resume: in another layout some processors round the product otherwise.
            basis = basis.to(like.device, torch.promote_types(like.dtype, torch.float32)).contiguous()
            shape = (layer.A.shape[0], k) if side == "left" else (k, layer.Bt.shape[1])
            module.sketch = GradientSketch(side, basis, basis.new_zeros(shape, requires_grad=True))
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
        for module in self._modules:
            module.sketch = None
        self.sums, self.side = [], None
        return found

    def fixed(self) -> list[Tensor]:
        """What :meth:`open` was given, n×k or m×k for each layer; empty while closed."""
        return [sketch.basis for sketch in self._sketches()]

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

    def _sketches(self) -> list[GradientSketch]:
        return [module.sketch for module in self._modules if module.sketch is not None]

    def _leaves(self) -> list[Tensor]:
        return [sketch.leaf for sketch in self._sketches()]

    def _totals(self) -> list[Tensor]:
        if self.sums:
            return self.sums
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self._leaves()]


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
