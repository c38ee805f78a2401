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

from .products import shaped
from .reading import LINEAR, Reading

Side = Literal["left", "right"]  # which singular directions of G the sketch spans: of GΩ (m×k), or of GᵀQ (n×k)


class GradientSketch(NamedTuple):
    """A leaf that gathers GΩ (``"left"``, m×k) or (GᵀQ)ᵀ (``"right"``, k×n) as its ``.grad``."""

    side: Side
    basis: Tensor  # Ω, n×k, or Q, m×k; fixed
    leaf: Tensor


def gather_sketch(result: Tensor, x: Tensor, sketch: GradientSketch, reads: Reading = LINEAR) -> Tensor:
    """``result``, a layer's outputs, as it is; backward adds the sketch of G to the leaf's. x: what the layer reads."""
    return _Gather.apply(result, x, sketch.leaf, sketch.basis, sketch.side, reads)  # pyright: ignore


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, result: Tensor, x: Tensor, leaf: Tensor, basis: Tensor, side: Side, reads: Reading
    ) -> Tensor:
        left = side == "left"
        ctx.side, ctx.leaf_dtype, ctx.reads = side, leaf.dtype, reads
        ctx.save_for_backward(reads.times(x, basis.to(result)) if left else x, None if left else basis)
        return shaped(result, result.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        saved, basis = ctx.saved_tensors
        flat = ctx.reads.rows(g)
        left = ctx.side == "left"
        found = flat.mT @ saved.to(g) if left else ctx.reads.transposed(saved, flat @ basis.to(g)).mT
        return g, None, found.to(ctx.leaf_dtype), None, None, None
