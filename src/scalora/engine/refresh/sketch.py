"""Sketches GΩ and GᵀQ of every layer's gradient, summed over steps and processes (:mod:`layers.gradient_sketch`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...layers.adopt import adopt
from ...layers.gradient_sketch import GradientSketch, Side
from ...layers.lora_forward import LoraForward
from ...layers.peft_lora import AdapterLayer
from ...layers.sharding import local_shard
from ..groups import grouped
from ..leaves import Leaves, new_leaf


class Sketch:
    """Sums of one sketch per layer over the backward passes between :meth:`open` and :meth:`close`."""

    def __init__(self, layers: Sequence[AdapterLayer]) -> None:
        self.layers = list(layers)
        self.side: Side | None = None
        self._leaves = Leaves([])
        self._modules = [adopt(layer.module, LoraForward) for layer in layers]  # pyright: ignore[reportArgumentType]

    @torch.no_grad()
    def open(self, side: Side, fixed: Sequence[Tensor]) -> None:
        """Begin to gather GΩ (``"left"``, `fixed` holds Ω, n×k, of each layer) or GᵀQ (``"right"``, Q, m×k)."""
        self.side = side
        for group in grouped(self.layers):
            like = local_shard(group.layers[0].A.detach())
            wide = torch.promote_types(like.dtype, torch.float32)
            # Contiguous, as it is after a resume: in another layout some processors round the product otherwise.
            bases = torch.stack([fixed[i] for i in group.members]).to(like.device, wide)
            (m, n), k = group.layers[0].shape, bases.shape[-1]
            zero, shape = bases.new_zeros(()), (m, k) if side == "left" else (k, n)
            for i, basis in zip(group.members, bases, strict=True):
                self._modules[i].sketch = GradientSketch(side, basis, new_leaf(zero, *shape))
        self._leaves = Leaves([sketch.leaf for sketch in self._sketches()])

    def gather(self) -> None:
        """To be called once a step. A collective where there are several processes.

        Raises:
            ScaloraError: the step's gradients came by a pass that sketches cannot see.
        """
        if self.side is not None:
            self._leaves.refuse_unseen((layer.A for layer in self.layers), "refresh")
            self._leaves.gather()

    def close(self) -> list[Tensor]:
        """The sums (m×k or n×k), zero for a layer without gradient; nothing is gathered any more."""
        found = [total if self.side == "left" else total.mT for total in self._leaves.totals()]
        for module in self._modules:
            module.sketch = None
        self._leaves, self.side = Leaves([]), None
        return found

    def fixed(self) -> list[Tensor]:
        """What :meth:`open` was given, n×k or m×k for each layer; empty while closed."""
        return [sketch.basis for sketch in self._sketches()]

    def state_dict(self) -> dict[str, Any]:
        names = [layer.name for layer in self.layers]
        parts = {"fixed": self.fixed(), "sums": self._leaves.totals()}
        return {"side": self.side} | {
            part: {name: t.detach().clone() for name, t in zip(names, tensors, strict=False)}
            for part, tensors in parts.items()
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state["side"] is None:
            self.close()
            return
        self.open(state["side"], [state["fixed"][layer.name] for layer in self.layers])
        self._leaves.load([state["sums"][layer.name] for layer in self.layers])

    def _sketches(self) -> list[GradientSketch]:
        return [module.sketch for module in self._modules if module.sketch is not None]
