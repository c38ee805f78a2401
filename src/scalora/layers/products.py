"""Several adapters added to a layer's output in two matrix products, forward and backward.

Products with few columns cost what they read and write, not what they compute: one pass over the output for all
adapters takes hardly longer than one for each would. Autograd alone would pay for the joining with gradients of the
frozen adapters too; here only what is trained gets one. An adapter with a zero matrix is there for that matrix's
gradient, and takes part only in the products which that needs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from .sharding import is_sharded

Zero = Literal["Bt", "A"]


class Adapter(NamedTuple):
    """One adapter x ↦ scale·(x B) Aᵀ. Where one matrix is declared zero, the other gets no gradient."""

    Bt: Tensor  # (r, n)
    A: Tensor  # (m, r)
    scale: float = 1.0
    zero: Zero | None = None


def add_adapters(result: Tensor, x: Tensor, adapters: Sequence[Adapter]) -> Tensor:
    """result + Σ s·(x B) Aᵀ, computed where `result` is and in its dtype.

    Args:
        result: (…, m).
        x: (…, n).
        adapters: of any number of columns, floating dtype and device; each matrix may be trained or frozen. The
            gradients are those of autograd up to rounding; they cannot be differentiated again.
    """
    # What is to be added has the first columns.
    adapters = sorted(adapters, key=lambda each: each.zero is not None)
    return _ThinSum.apply(result, x, *taken_apart(adapters))  # pyright: ignore


class _ThinSum(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        result: Tensor,
        x: Tensor,
        scales: tuple[float, ...],
        zeros: tuple[Zero | None, ...],
        *matrices: Tensor,
    ) -> Tensor:
        x_like = x.to(result.dtype)
        inner = but(zeros, "Bt")
        h = x_like.flatten(0, -2) @ joined_Bt(matrices, inner, result).mT
        A = joined_A(matrices, scales, but(zeros, "Bt", "A"), result)
        out = torch.addmm(result.flatten(0, -2), h[:, : A.shape[1]], A.mT).view(result.shape)
        trained = ctx.needs_input_grad[4:]
        # A slice would keep all of h alive.
        kept = [own.clone() for i, own in columns(h, matrices, inner).items() if trained[2 * i + 1]]
        ctx.scales, ctx.zeros, ctx.dtype = scales, zeros, x.dtype
        ctx.save_for_backward(x_like if any(trained[::2]) else None, *kept, *matrices)
        ctx.shape = x.shape
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *kept = ctx.saved_tensors
        kept, matrices = kept[: -2 * len(ctx.scales)], tuple(kept[-2 * len(ctx.scales) :])
        trained = ctx.needs_input_grad[4:]
        outer = but(ctx.zeros, "A")
        flat = g.flatten(0, -2)
        gh = flat @ joined_A(matrices, ctx.scales, outer, g)
        gx = None
        if ctx.needs_input_grad[1]:
            Bt = joined_Bt(matrices, but(ctx.zeros, "Bt", "A"), g)
            gx = (gh[:, : Bt.shape[0]] @ Bt).view(ctx.shape).to(ctx.dtype)
        of_A = dict(zip((i for i in but(ctx.zeros, "Bt") if trained[2 * i + 1]), kept, strict=True))
        of_Bt = {i: own for i, own in columns(gh, matrices, outer).items() if trained[2 * i]}
        return g, gx, None, None, *matrix_gradients(matrices, ctx.scales, x, flat, of_A, of_Bt)


def taken_apart(adapters: Sequence[Adapter]) -> tuple[Any, ...]:
    """As an autograd function takes them: scales, zeros, B₁ᵀ, A₁, B₂ᵀ, …"""
    matrices = [matrix for each in adapters for matrix in (each.Bt, each.A)]
    return tuple(each.scale for each in adapters), tuple(each.zero for each in adapters), *matrices


def but(zeros: Sequence[Zero | None], *without: Zero) -> list[int]:
    """The adapters whose zero matrix, if there is one, is none of these."""
    return [i for i, zero in enumerate(zeros) if zero not in without]


def joined_Bt(matrices: Sequence[Tensor], which: Iterable[int], like: Tensor) -> Tensor:
    """[B₁ B₂ …]ᵀ."""
    return torch.cat([like.new_empty(0, matrices[0].shape[1]), *(matrices[2 * i].to(like) for i in which)])


def joined_A(matrices: Sequence[Tensor], scales: Sequence[float], which: Iterable[int], like: Tensor) -> Tensor:
    """[s₁A₁ s₂A₂ …]."""
    scaled = ((i, matrices[2 * i + 1]) for i in which)
    parts = [(A if scales[i] == 1 else A * scales[i]).to(like) for i, A in scaled]
    return torch.cat([like.new_empty(matrices[1].shape[0], 0), *parts], 1)


def columns(joined: Tensor, matrices: Sequence[Tensor], which: Sequence[int]) -> dict[int, Tensor]:
    """The columns of each of these adapters among those of all of these."""
    ranks = [matrices[2 * i].shape[0] for i in which]
    return {i: joined[:, end - rank : end] for i, rank, end in zip(which, ranks, accumulate(ranks), strict=True)}


def matrix_gradients(
    matrices: Sequence[Tensor],
    scales: Sequence[float],
    x: Tensor,
    g: Tensor,
    of_A: Mapping[int, Tensor],
    of_Bt: Mapping[int, Tensor],
) -> list[Tensor | None]:
    """Gradients of B₁ᵀ, A₁, B₂ᵀ, … where ``of_A`` holds x B of those whose A is trained, ``of_Bt`` s·g A likewise."""
    gradients: list[Tensor | None] = [None] * len(matrices)
    for i, gh in of_Bt.items():
        gradients[2 * i] = (gh.mT @ x.flatten(0, -2)).to(matrices[2 * i])
    for i, h in of_A.items():
        gradients[2 * i + 1] = (h.mT @ g).mT.to(matrices[2 * i + 1]) * scales[i]
    return gradients


def frozen_weight(base: nn.Module, x: Tensor) -> Tensor | None:
    """The weight (m×n) of a linear layer that may be read past its forward pass; None where that would differ.

    It is frozen, of 32 bits or more (half precision would round small updates away), of the dtype of `x` but for
    autocast, and nobody listens to the layer's calls or has put in a forward pass of his own.
    """
    if type(base) not in (nn.Linear, Conv1D) or "forward" in vars(base):
        return None
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return None
    W = base.weight
    assert isinstance(W, Tensor)
    if W.requires_grad or W.dtype.itemsize < 4 or is_sharded(W):
        return None
    if not (W.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)):
        return None
    return W.mT if isinstance(base, Conv1D) else W


def pays(x: Tensor, W: Tensor) -> bool:
    """Whether there are so many tokens that forming the sum is the cheaper way: by counting, and half as many again
    where it is formed anew for backward (docs/performance.md)."""
    formed_twice = x.dtype == W.dtype  # else autocast, where it is kept
    return x.numel() // x.shape[-1] * sum(W.shape) > (1.5 if formed_twice else 1) * W.numel()


def merged_linear(x: Tensor, W: Tensor, bias: Tensor | None, adapters: Sequence[Adapter]) -> Tensor:
    """x (W + Σ s·A Bᵀ)ᵀ + bias, in the dtype of `x`.

    Args:
        x: (…, n).
        W: (m, n), frozen.
        bias: (m,).
        adapters: as :func:`add_adapters` takes them. The gradients cannot be differentiated again.
    """
    return _MergedLinear.apply(x, W, bias, *taken_apart(adapters))  # pyright: ignore


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any,
        x: Tensor,
        W: Tensor,
        bias: Tensor | None,
        scales: tuple[float, ...],
        zeros: tuple[Zero | None, ...],
        *matrices: Tensor,
    ) -> Tensor:
        trained = ctx.needs_input_grad[5:]
        ctx.inner, ctx.outer = ([i for i, needed in enumerate(own) if needed] for own in (trained[1::2], trained[::2]))
        ctx.scales, ctx.zeros = scales, zeros
        with torch.autocast(x.device.type, enabled=False):
            h = x.flatten(0, -2) @ joined_Bt(matrices, ctx.inner, x).mT if ctx.inner else None
            total = _sum(W, scales, zeros, matrices, x)
            kept = total if ctx.needs_input_grad[0] and total.dtype != W.dtype else None
            ctx.save_for_backward(x if ctx.outer else None, h, W, kept, *matrices)
            return nn.functional.linear(x, total, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, h, W, total, *matrices = ctx.saved_tensors
        flat = g.flatten(0, -2)
        with torch.autocast(g.device.type, enabled=False):
            if ctx.needs_input_grad[0] and total is None:
                total = _sum(W, ctx.scales, ctx.zeros, matrices, g)
            gx = g @ total if ctx.needs_input_grad[0] else None
            gh = flat @ joined_A(matrices, ctx.scales, ctx.outer, g) if ctx.outer else g
            of_A, of_Bt = columns(h, matrices, ctx.inner), columns(gh, matrices, ctx.outer)
            gradients = matrix_gradients(matrices, ctx.scales, x, flat, of_A, of_Bt)
        return gx, None, flat.sum(0) if ctx.needs_input_grad[2] else None, None, None, *gradients


def _sum(
    W: Tensor, scales: Sequence[float], zeros: Sequence[Zero | None], matrices: Sequence[Tensor], like: Tensor
) -> Tensor:
    """W + Σ s·A Bᵀ, rounded to the dtype of `like` at the end."""
    heard = but(zeros, "Bt", "A")
    A, Bt = joined_A(matrices, scales, heard, like), joined_Bt(matrices, heard, like)
    if like.dtype == W.dtype:
        return torch.addmm(W, A, Bt)
    return (A @ Bt).add_(W)  # added in W's dtype
