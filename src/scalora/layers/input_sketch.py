"""A thin product with the second moments of a layer's inputs, gathered as gradients are (:mod:`.gradient_sketch`).

Only inputs count whose output gets a gradient: padding does not. Some gradients are zero but for rounding, as that of a
first token's query, which has one key to look at.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ROUNDING = 1e-5  # of a pass's largest gradient


class InputSketch(NamedTuple):
    """Leaves that gather Σ x(xᵀΦ) (n×k) and Σ xᵀx (0-d) over inputs x as their ``.grad``."""

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
        sizes = g.detach().abs().amax(-1).flatten()
        x = x.flatten(0, -2).to(basis) * (sizes > ROUNDING * sizes.max())[:, None]
        return g, None, None, x.mT @ (x @ basis), x.square().sum()
