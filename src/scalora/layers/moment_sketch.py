"""Thin products with the second moments of a layer's inputs and of its outputs' gradients, gathered in backward passes.

One token's gradient is g xᵀ: an input counts by |g|², an output's gradient by |x|². Padding has no gradient. The first
token, whose activations are in many models far larger than all others, has hardly any.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .products import shaped
from .reading import LINEAR, Reading


class MomentSketch(NamedTuple):
    """Leaves that gather CΦ (n×k), DΨ (m×k) and the trace that C and D share (0-d) as their ``.grad``.

    C = Σ|g|²xxᵀ and D = Σ|x|²ggᵀ over inputs x (n) and gradients g (m) of their outputs.
    """

    inputs: Tensor  # Φ, n×k; fixed
    outputs: Tensor  # Ψ, m×k; fixed
    of_inputs: Tensor
    of_outputs: Tensor
    trace: Tensor

    @property
    def leaves(self) -> list[Tensor]:
        return [self.of_inputs, self.of_outputs, self.trace]


def gather_moments(result: Tensor, x: Tensor, sketch: MomentSketch, reads: Reading = LINEAR) -> Tensor:
    """``result``, a layer's outputs, as it is; backward adds to the leaves' gradients. x: what the layer reads."""
    return _Gather.apply(result, x, reads, *sketch)  # pyright: ignore


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, result: Tensor, x: Tensor, reads: Reading, inputs: Tensor, outputs: Tensor, *leaves: Tensor
    ) -> Tensor:
        ctx.reads = reads
        ctx.save_for_backward(x, inputs, outputs)
        return shaped(result, result.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, inputs, outputs = ctx.saved_tensors
        x = x.to(inputs) if x.is_floating_point() else x  # once for all that reads it
        y = ctx.reads.rows(g).to(outputs)
        of_x, of_y = ctx.reads.squares(x, inputs), y.square().sum(-1, keepdim=True)
        seen = ctx.reads.transposed(x, of_y * ctx.reads.times(x, inputs))
        trace = torch.dot(of_x.flatten(), of_y.flatten())
        return g, None, None, None, None, seen, y.mT @ (of_x * (y @ outputs)), trace
