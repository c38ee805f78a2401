"""HiRA's forward pass, W + W∘(BA), in one product instead of PEFT's two, which keeps no product of the weight's size.

PEFT computes x Wᵀ + x (W∘(BA))ᵀ and lets autograd keep what both need. Here the adapted weight is formed once forward
and once again backward, which costs little where there are many more tokens than r; the gradients of A and B are those
of W∘G with G = gᵀx, the weight's own.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.hira.layer import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .adopt import adopt
from .products import frozen_weight
from .sharding import is_sharded


class HiraForward(Linear):
    """PEFT's HiRA layer with a shorter forward pass where one plain adapter on a plain weight is asked for."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As PEFT's; whatever is out of the ordinary takes PEFT's own way."""
        matrices = None if args or kwargs else self._plain_matrices(x)
        if matrices is None:
            return super().forward(x, *args, **kwargs)
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            x = x.to(torch.get_autocast_dtype(x.device.type))
        return hadamard_linear(x, *matrices, self.base_layer.bias)  # pyright: ignore

    def _plain_matrices(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """W, and A and B of the one active adapter; None where the short way would not do the same."""
        base, names = self.base_layer, [name for name in self.active_adapters if name in self.hira_A]
        if self.disable_adapters or self.merged or type(base) is not nn.Linear or len(names) != 1 or x.ndim < 2:
            return None
        if self.training and not isinstance(self.hira_dropout[names[0]], nn.Identity):
            return None
        W = frozen_weight(base, x)
        A, B = self.hira_A[names[0]], self.hira_B[names[0]]
        # Without autocast PEFT computes in the adapter's dtype, which may be wider than the input's.
        if W is None or is_sharded(A) or not (A.dtype == x.dtype or torch.is_autocast_enabled(x.device.type)):
            return None
        return W, A, B


def fuse_hira(model: nn.Module) -> None:
    """Every HiRA layer that is PEFT's own for linear layers takes the short way where it can."""
    for module in model.modules():
        if type(module) is Linear:
            adopt(module, HiraForward)


def hadamard_linear(x: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (W∘(1 + BA))ᵀ + bias in the dtype of `x`; the adapted weight is formed in A's dtype or W's, the wider one.

    Args:
        x: (…, n).
        W: (m, n), frozen.
        A: (r, n).
        B: (m, r).
        bias: (m,).

    Source: HiRA (Huang et al., ICLR 2025). The gradients cannot be differentiated again.
    """
    return _HadamardLinear.apply(x, W, A, B, bias)  # pyright: ignore


class _HadamardLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, W: Tensor, A: Tensor, B: Tensor, bias: Tensor | None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx.save_for_backward(x, W, A, B)
        with torch.autocast(x.device.type, enabled=False):
            return nn.functional.linear(x, _adapted(W, A, B).to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, W, A, B = ctx.saved_tensors
        with torch.autocast(x.device.type, enabled=False):
            gx = g @ _adapted(W, A, B).to(g.dtype) if ctx.needs_input_grad[0] else None
            G = (g.flatten(0, -2).mT @ x.flatten(0, -2)).to(torch.promote_types(W.dtype, A.dtype)).mul_(W)
            A, B = A.to(G), B.to(G)
            gA, gB = B.mT @ G, G @ A.mT
        bias = g.flatten(0, -2).sum(0) if ctx.needs_input_grad[4] else None
        return gx, None, gA.to(ctx.saved_tensors[2]), gB.to(ctx.saved_tensors[3]), bias


def _adapted(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """W∘(1 + BA)."""
    wide = torch.promote_types(W.dtype, A.dtype)
    return torch.addmm(torch.ones((), dtype=wide, device=W.device), B.to(wide), A.to(wide)).mul_(W)
