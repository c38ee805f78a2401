"""Several adapters of one linear layer in few products: added to its output, or to its weight.

*Added to the output* (:func:`add_adapters`): two thin products for all adapters, forward and backward. Products with
few columns cost what they read and write, not what they compute: one pass over the output for all hardly takes longer
than one for each would.

*Added to the weight* (:func:`merged_linear`): W + Σ s·B A, in PEFT's letters, is formed anew for each pass. With many
tokens that takes fewer operations: T·k·(m + n) are those of T tokens and k columns, m·n·k those of the sum. What is
trained needs two of the four products all the same, for its gradients. Under autocast the sum waits for backward, as
the cast weight of an ordinary layer does; else it is formed again there, and the memory is that of one weight.

Autograd alone would pay with gradients of frozen columns too; here only what is trained gets one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from .layout import is_plain
from .sharding import is_sharded

_CHUNK = 1 << 17  # numbers: 0.5 MiB in float32


class Growth(NamedTuple):
    """How frozen columns have come to be. Versions are torch's, of lora_A and lora_B: whoever writes changes them."""

    columns: tuple[int, ...]  # in use at first, and after each time that more were written behind them
    before: tuple[int, int]  # the last of these times
    after: tuple[int, int]


class Adapter(NamedTuple):
    """One adapter x ↦ scale·(x lora_Aᵀ) lora_Bᵀ."""

    lora_A: Tensor  # (r, n)
    lora_B: Tensor  # (m, r)
    scale: float = 1.0
    growth: Growth | None = None


def add_adapters(result: Tensor, x: Tensor, adapters: Sequence[Adapter], dtype: torch.dtype | None = None) -> Tensor:
    """result + Σ s·(x lora_Aᵀ) lora_Bᵀ, computed where `result` is, in its dtype.

    Args:
        result: (…, m).
        x: (…, n).
        dtype: a wider one that products and sum are computed in instead, which is rounded once, at the end.
        adapters: of any number of columns, floating dtype and device; each matrix may be trained or frozen. The
            gradients are those of autograd up to rounding; they cannot be differentiated again.
    """
    return _ThinSum.apply(result, x, dtype or result.dtype, *_flatten(adapters))  # pyright: ignore


def merged_linear(x: Tensor, W: Tensor, bias: Tensor | None, adapters: Sequence[Adapter]) -> Tensor:
    """x (W + Σ s·lora_B lora_A)ᵀ + bias, in the dtype of `x`.

    Args:
        x: (…, n).
        W: (m, n), frozen.
        bias: (m,).
        adapters: as :func:`add_adapters` takes them. The gradients cannot be differentiated again.
    """
    return _MergedLinear.apply(x, W, bias, *_flatten(adapters))  # pyright: ignore


def summed(W: Tensor, adapters: Sequence[Adapter], like: Tensor) -> Tensor:
    """W + Σ s·lora_B lora_A, (m, n), rounded to the dtype of `like` at the end."""
    scales, *matrices = _flatten(adapters)
    return _sum(W, scales, matrices, like)


def frozen_weight(base: nn.Module, x: Tensor, half: bool = False) -> Tensor | None:
    """The weight (m×n) of a linear layer that may be read past its forward pass; None where that would differ.

    It is frozen, of 32 bits or more unless ``half`` lets others pass, of the dtype of `x` but for autocast, and nobody
    listens to the layer's calls or has put in a forward pass of his own.
    """
    if type(base) not in (nn.Linear, Conv1D) or "forward" in vars(base):
        return None
    if base._forward_hooks or base._forward_pre_hooks or base._backward_hooks or base._backward_pre_hooks:
        return None
    W = base.weight
    assert isinstance(W, Tensor)
    if W.requires_grad or is_sharded(W) or not is_plain(W):
        return None
    if W.dtype.itemsize < 4 and not (half and W.dtype in (torch.bfloat16, torch.float16)):
        return None
    if not (W.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)):
        return None
    return W.mT if isinstance(base, Conv1D) else W


def merging_is_cheaper(x: Tensor, W: Tensor) -> bool:
    """Whether there are so many tokens that forming the sum is the cheaper way: by counting, and half as many again
    where it is formed anew for backward (docs/performance.md)."""
    formed_twice = x.dtype == W.dtype  # else autocast, where it is kept
    return x.numel() // x.shape[-1] * sum(W.shape) > (1.5 if formed_twice else 1) * W.numel()


def row_chunks(W: Tensor) -> list[slice]:
    """Rows of a weight to be taken at a time where copies are made of them; on a GPU all.

    A CPU gets new pages for each large copy, which takes several times the work.
    """
    rows = max(1, _CHUNK // W.shape[1]) if W.is_cpu else W.shape[0]
    return [slice(start, start + rows) for start in range(0, W.shape[0], rows)]


def shaped(tensor: Tensor, shape: torch.Size) -> Tensor:
    """In this shape, and no view to autograd: outputs of a function of ours may be written to, as ReLU(inplace=True)
    does, and views that were made within it may not."""
    return torch.ops.aten._unsafe_view(tensor, shape)  # pyright: ignore


class _ThinSum(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, result: Tensor, x: Tensor, wide: torch.dtype, scales: tuple[float, ...], *matrices: Tensor
    ) -> Tensor:
        everyone = range(len(scales))
        scale, shares = _common(scales)
        x_like = x.to(result.device, wide)
        # A quantised layer's output may be wider than autocast's.
        on = torch.is_autocast_enabled(x.device.type)
        with torch.autocast(x.device.type, enabled=False) if on else nullcontext():
            h = x_like.flatten(0, -2) @ _stacked_A(matrices, everyone, x_like).mT
            out = _added(result.flatten(0, -2), h, _stacked_B(matrices, shares, everyone, x_like).mT, scale)
        trained = ctx.needs_input_grad[4:]
        kept = [own for i, own in _columns(h, matrices, everyone).items() if trained[2 * i + 1]]
        if wide == result.dtype and h.shape[1] > sum(own.shape[1] for own in kept):
            kept = [own.clone() for own in kept]  # a slice would keep all of h alive; beside a wider x that is little
        ctx.scales, ctx.wide, ctx.dtype, ctx.shape = scales, wide, x.dtype, x.shape
        ctx.save_for_backward(x_like if any(trained[::2]) else None, *kept, *matrices)
        return shaped(out, result.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, *kept = ctx.saved_tensors
        kept, matrices = kept[: -2 * len(ctx.scales)], tuple(kept[-2 * len(ctx.scales) :])
        everyone, trained = range(len(ctx.scales)), ctx.needs_input_grad[4:]
        scale, shares = _common(ctx.scales)
        flat = g.flatten(0, -2).to(ctx.wide)
        gh = _product(scale, flat, _stacked_B(matrices, shares, everyone, flat))
        gx = None
        if ctx.needs_input_grad[1]:
            gx = (gh @ _stacked_A(matrices, everyone, gh)).view(ctx.shape).to(ctx.dtype)
        of_B = dict(zip((i for i in everyone if trained[2 * i + 1]), kept, strict=True))
        of_A = {i: own for i, own in _columns(gh, matrices, everyone).items() if trained[2 * i]}
        return g, gx, None, None, *_matrix_gradients(matrices, ctx.scales, x, flat, of_A, of_B)


class _MergedLinear(torch.autograd.Function):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, x: Tensor, W: Tensor, bias: Tensor | None, scales: tuple[float, ...], *matrices: Tensor
    ) -> Tensor:
        trained = ctx.needs_input_grad[4:]
        ctx.of_A, ctx.of_B = ([i for i, needed in enumerate(own) if needed] for own in (trained[::2], trained[1::2]))
        ctx.scales = scales
        with torch.autocast(x.device.type, enabled=False):
            h = x.flatten(0, -2) @ _stacked_A(matrices, ctx.of_B, x).mT if ctx.of_B else None
            total = _sum(W, scales, matrices, x)
            kept = total if ctx.needs_input_grad[0] and total.dtype != W.dtype else None
            ctx.save_for_backward(x if ctx.of_A else None, h, W, kept, *matrices)
            return nn.functional.linear(x, total, None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, h, W, total, *matrices = ctx.saved_tensors
        flat = g.flatten(0, -2)
        with torch.autocast(g.device.type, enabled=False):
            if ctx.needs_input_grad[0] and total is None:
                total = _sum(W, ctx.scales, matrices, g)
            gx = g @ total if ctx.needs_input_grad[0] else None
            scale, shares = _common(ctx.scales)
            gh = _product(scale, flat, _stacked_B(matrices, shares, ctx.of_A, g)) if ctx.of_A else g
            of_A, of_B = _columns(gh, matrices, ctx.of_A), _columns(h, matrices, ctx.of_B)
            gradients = _matrix_gradients(matrices, ctx.scales, x, flat, of_A, of_B)
        return gx, None, flat.sum(0) if ctx.needs_input_grad[2] else None, None, *gradients


def _sum(W: Tensor, scales: Sequence[float], matrices: Sequence[Tensor], like: Tensor) -> Tensor:
    """W + Σ s·lora_B lora_A, rounded to the dtype of `like` at the end."""
    everyone = range(len(scales))
    scale, shares = _common(scales)
    B, A = _stacked_B(matrices, shares, everyone, like), _stacked_A(matrices, everyone, like)
    if like.dtype == W.dtype:
        return torch.addmm(W, B, A, alpha=scale)
    return _add_weight(_product(scale, B, A), W)


def _added(result: Tensor, h: Tensor, Bt: Tensor, scale: float) -> Tensor:
    """result + scale·h Bᵀ in the dtype of `result`, which may be narrower than that of the products."""
    if result.dtype == h.dtype:
        return torch.addmm(result, h, Bt, alpha=scale)
    if result.is_cpu:
        return _product(scale, h, Bt).add_(result).to(result.dtype)
    # One pass over the sum, which a GPU rounds on its way.
    return torch.add(result, h @ Bt, alpha=scale, out=torch.empty_like(result))


def _add_weight(S: Tensor, W: Tensor) -> Tensor:
    """S + W in S, added in W's dtype."""
    for rows in row_chunks(W):
        S[rows] += W[rows]
    return S


def _product(scale: float, X: Tensor, Y: Tensor) -> Tensor:
    """scale·X Y in one operation."""
    return torch.addmm(X.new_empty(()), X, Y, beta=0, alpha=scale)


def _common(scales: Sequence[float]) -> tuple[float, list[float]]:
    """A scale for all, which products multiply by on their way, and what share of it is whose."""
    first = scales[0] or 1.0
    return first, [s / first for s in scales]


def _flatten(adapters: Sequence[Adapter]) -> tuple[Any, ...]:
    """As an autograd function takes them: scales, then lora_A and lora_B of the first, of the second, …"""
    matrices = [matrix for each in adapters for matrix in (each.lora_A, each.lora_B)]
    return tuple(each.scale for each in adapters), *matrices


def _stacked_A(matrices: Sequence[Tensor], which: Iterable[int], like: Tensor) -> Tensor:
    """lora_A of these adapters above one another, (k, n)."""
    return _cat([matrices[2 * i].to(like) for i in which], 0)


def _stacked_B(matrices: Sequence[Tensor], scales: Sequence[float], which: Iterable[int], like: Tensor) -> Tensor:
    """s·lora_B of these adapters beside one another, (m, k)."""
    scaled = ((scales[i], matrices[2 * i + 1]) for i in which)
    return _cat([(B if s == 1 else B * s).to(like) for s, B in scaled], 1)


def _cat(parts: Sequence[Tensor], dim: int) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def _columns(joined: Tensor, matrices: Sequence[Tensor], which: Sequence[int]) -> dict[int, Tensor]:
    """The columns of each of these adapters among those of all of these."""
    ranks = [matrices[2 * i].shape[0] for i in which]
    return {i: joined[:, end - rank : end] for i, rank, end in zip(which, ranks, accumulate(ranks), strict=True)}


def _matrix_gradients(
    matrices: Sequence[Tensor],
    scales: Sequence[float],
    x: Tensor,
    g: Tensor,
    of_A: Mapping[int, Tensor],
    of_B: Mapping[int, Tensor],
) -> list[Tensor | None]:
    """Gradients in the order of ``matrices``: ``of_A`` holds s·g lora_B where lora_A is trained, ``of_B`` x lora_Aᵀ."""
    gradients: list[Tensor | None] = [None] * len(matrices)
    for i, gh in of_A.items():
        gradients[2 * i] = (gh.mT @ x.flatten(0, -2)).to(matrices[2 * i])
    for i, h in of_B.items():
        # A few long rows take a CPU a quarter of the time; autograd copies what is transposed, which a GPU minds more.
        found = _product(scales[i], h.mT, g).mT if g.is_cpu else _product(scales[i], g.mT, h)
        gradients[2 * i + 1] = found.to(matrices[2 * i + 1])
    return gradients
