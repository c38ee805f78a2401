"""A thin product with the gradient of a frozen weight, from autograd itself.

With G = gᵀx the gradient of a weight W (m×n), x (T×n) a layer's input and g (T×m) the gradient of its output, a leaf
that belongs to the output in name only gets GΩ = gᵀ(xΩ), or (GᵀQ)ᵀ = (gQ)ᵀx, as its gradient: the cost of a LoRA
adapter of as many columns. Micro-batches, autocast, activation checkpointing and torch.compile are thereby autograd's
business. The leaves are no parameters of the model: clipping, the optimizer, DDP and checkpoints do not see them.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reading import Reading

Side = Literal["left", "right"]  # which singular directions of G the sketch spans: of GΩ (m×k), or of GᵀQ (n×k)


class GradientSketch(NamedTuple):
    """A leaf that gathers GΩ (``"left"``, m×k) or (GᵀQ)ᵀ (``"right"``, k×n) as its ``.grad``."""

    side: Side
    basis: Tensor  # Ω, n×k, or Q, m×k; fixed
    leaf: Tensor


def gather_sketch(result: Tensor, x: Tensor, sketch: GradientSketch, reads: Reading | None = None) -> Tensor:
    """``result`` (…, m) as it is; backward adds the sketch of gᵀx to the leaf's. x: (…, n), or what is read."""
    if reads is not None:
        return _GatherRead.apply(result, x, sketch.leaf, sketch.basis, sketch.side, reads)  # pyright: ignore
    return _Gather.apply(result, x, sketch.leaf, sketch.basis, sketch.side)  # pyright: ignore


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, result: Tensor, x: Tensor, leaf: Tensor, basis: Tensor, side: Side
    ) -> Tensor:
        flat = x.to(result.dtype).flatten(0, -2)
        left = side == "left"
        ctx.side, ctx.leaf_dtype = side, leaf.dtype
        ctx.save_for_backward(flat @ basis.to(result) if left else flat, None if left else basis)
        return result.view_as(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved, basis = ctx.saved_tensors
        flat = g.flatten(0, -2)
        saved = saved.to(g)
        found = (saved.mT @ flat).mT if ctx.side == "left" else (flat @ basis.to(g)).mT @ saved
        return g, None, found.to(ctx.leaf_dtype), None, None


class _GatherRead(torch.autograd.Function):
    """As the one above, of inputs that are read."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, result: Tensor, x: Tensor, leaf: Tensor, basis: Tensor, side: Side, reads: Reading
    ) -> Tensor:
        ctx.side, ctx.reads = side, reads
        ctx.save_for_backward(x, basis)
        return result.view_as(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, basis = ctx.saved_tensors
        flat = ctx.reads.rows(g).to(basis)
        left = ctx.side == "left"
        found = flat.mT @ ctx.reads.times(x, basis) if left else ctx.reads.transposed(x, flat @ basis).mT
        return g, None, found, None, None, None
