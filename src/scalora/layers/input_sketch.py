"""A thin product with the second moments of a layer's inputs, gathered as gradients are (:mod:`.gradient_sketch`).

An input counts by the squared gradient of its output. Padding has none. The first token, which in many models is far
larger than all others and says nothing, has hardly any.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class InputSketch(NamedTuple):
    """Leaves that gather Σ w·x(xᵀΦ) (n×k) and Σ w·xᵀx (0-d) over inputs x as their ``.grad``; w = |g|², g (m) of x."""

    basis: Tensor  # Φ, n×k; fixed
    product: Tensor
    trace: Tensor


def gather_inputs(result: Tensor, x: Tensor, sketch: InputSketch) -> Tensor:
    """``result`` (…, m) as it is; backward adds to the leaves' gradients. x: (…, n)."""
    return _Gather.apply(result, x, *sketch)  # pyright: ignore


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, basis: Tensor, product: Tensor, trace: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, basis)
        return result.view_as(result)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, basis = ctx.saved_tensors
        x = x.flatten(0, -2).to(basis) * torch.linalg.vector_norm(g.to(basis), dim=-1).flatten()[:, None]
        return g, None, None, x.mT @ (x @ basis), x.square().sum()
