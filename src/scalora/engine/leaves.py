"""Gradients of tensors that no model has, summed over steps and processes: the leaves of sketches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..common.errors import ScaloraError


def new_leaf(zero: Tensor, *shape: int) -> Tensor:
    """A leaf of this shape for a sketch to gather in; in memory it is one 0-d zero, since only its gradient is read."""
    return zero.expand(shape).detach().requires_grad_()


class Leaves:
    """Sums of the gradients that backward passes give to `tensors`; where there is one process, they hold them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors = tensors
        self.sums = [leaf.new_zeros(leaf.shape) for leaf in tensors] if _several() else []

    def refuse_unseen(self, trained: Iterable[Tensor], setting: str) -> None:
        """Raise ScaloraError where what is `trained` got gradients by a pass that gave these tensors none."""
        if any(leaf.grad is not None for leaf in self.tensors) or all(p.grad is None for p in trained):
            return
        raise ScaloraError(
            f"{setting} needs sketches of the gradient, which loss.backward() makes; its gradients came without "
            "them, as torch.autograd.grad or backward(inputs=...) gives them: call loss.backward(), or leave it out"
        )

    @torch.no_grad()
    def gather(self) -> None:
        """To be called once a step: with several processes, each then holds the sum over all. A collective there."""
        if not _several():
            return
        gains = [leaf.new_zeros(leaf.shape) if leaf.grad is None else leaf.grad for leaf in self.tensors]
        flat = torch.cat([gain.flatten() for gain in gains])
        dist.all_reduce(flat)
        torch._foreach_add_(
            self.sums, [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in gains]), gains, strict=True)]
        )
        for leaf in self.tensors:
            leaf.grad = None

    def totals(self) -> list[Tensor]:
        """The sums; zero where there was no gradient."""
        if self.sums:
            return self.sums
        return [leaf.new_zeros(leaf.shape) if leaf.grad is None else leaf.grad for leaf in self.tensors]

    def load(self, totals: Sequence[Tensor]) -> None:
        """Go on from these sums."""
        totals = [total.to(leaf, copy=True) for total, leaf in zip(totals, self.tensors, strict=True)]
        if self.sums:
            self.sums = totals
            return
        for leaf, total in zip(self.tensors, totals, strict=True):
            leaf.grad = total


def _several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
