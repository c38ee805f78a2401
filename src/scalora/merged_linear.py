"""A linear layer and its adapters in one product, W + Σ s·A Bᵀ formed anew for each pass.

With many tokens that takes fewer operations than the adapters' own thin products: T·k·(m + n) are those of T tokens and
k columns, m·n·k those of the sum. What is trained needs two of the four products all the same, for its gradients. Under
autocast the sum waits for backward, as the cast weight of an ordinary layer does; else it is formed again there, and
the memory is that of one weight, while its layer is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from .sharded import is_sharded
from .thin_sum import Adapter, Zero, but, columns, joined_A, joined_Bt, matrix_gradients, taken_apart


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
        adapters: as :func:`scalora.thin_sum.add_adapters` takes them. The gradients cannot be differentiated again.
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
