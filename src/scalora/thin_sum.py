"""Several adapters added to a layer's output in two matrix products, forward and backward.

Products with few columns cost what they read and write, not what they compute: one pass over the output for all
adapters takes hardly longer than one for each would. Autograd alone would pay for the joining with gradients of the
frozen adapters too; here only what is trained gets one.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Adapter(NamedTuple):
    """One adapter x ↦ scale·(x B) Aᵀ."""

    Bt: Tensor  # (r, n)
    A: Tensor  # (m, r)
    scale: float = 1.0


def add_adapters(result: Tensor, x: Tensor, adapters: list[Adapter]) -> Tensor:
    """result + Σ s·(x B) Aᵀ, computed where `result` is and in its dtype.

    Args:
        result: (…, m).
        x: (…, n).
        adapters: of any number of columns, floating dtype and device; each matrix may be trained or frozen. The
            gradients are those of autograd up to rounding; they cannot be differentiated again.
    """
    matrices = [matrix for each in adapters for matrix in (each.Bt, each.A)]
    return _ThinSum.apply(result, x, tuple(each.scale for each in adapters), *matrices)  # pyright: ignore


class _ThinSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, x: Tensor, scales: tuple[float, ...], *matrices: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x_like = x.to(result.dtype)
        Bt, A = _joined(matrices, scales, result)
        h = x_like.flatten(0, -2) @ Bt.mT
        out = torch.addmm(result.flatten(0, -2), h, A.mT).view(result.shape)
        trained, columns = ctx.needs_input_grad[3:], _columns(matrices)
        # A slice would keep all of h alive.
        kept = [h[:, own].clone() for own, mine in zip(columns, trained[1::2], strict=True) if mine]
        ctx.scales, ctx.dtype = scales, x.dtype
        ctx.save_for_backward(x_like if any(trained[::2]) else None, *kept, *matrices)
        ctx.shape = x.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *kept = ctx.saved_tensors
        kept, matrices = kept[: -2 * len(ctx.scales)], tuple(kept[-2 * len(ctx.scales) :])
        Bt, A = _joined(matrices, ctx.scales, g)
        flat = g.flatten(0, -2)
        gh = flat @ A
        gx = (gh @ Bt).view(ctx.shape).to(ctx.dtype) if ctx.needs_input_grad[1] else None
        gradients: list[Tensor | None] = []
        h = iter(kept)
        for i, (own, scale) in enumerate(zip(_columns(matrices), ctx.scales, strict=True)):
            needs_Bt, needs_A = ctx.needs_input_grad[3 + 2 * i : 5 + 2 * i]
            gradients += [
                (gh[:, own].mT @ x.flatten(0, -2)).to(matrices[2 * i]) if needs_Bt else None,
                (next(h).mT @ flat).mT.to(matrices[2 * i + 1]) * scale if needs_A else None,
            ]
        return g, gx, None, *gradients


def _joined(matrices: tuple[Tensor, ...], scales: tuple[float, ...], like: Tensor) -> tuple[Tensor, Tensor]:
    """[B₁ B₂ …]ᵀ and [s₁A₁ s₂A₂ …]."""
    scaled = [A if scale == 1 else A * scale for A, scale in zip(matrices[1::2], scales, strict=True)]
    return torch.cat([Bt.to(like) for Bt in matrices[::2]]), torch.cat([A.to(like) for A in scaled], 1)


def _columns(matrices: tuple[Tensor, ...]) -> list[slice]:
    """Where each adapter's columns lie among all."""
    ends = accumulate(Bt.shape[0] for Bt in matrices[::2])
    return [slice(end - Bt.shape[0], end) for end, Bt in zip(ends, matrices[::2], strict=True)]
