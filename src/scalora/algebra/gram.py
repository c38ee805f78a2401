"""The five r×r products that an event reads adapters and gradients through; nothing of size m×n is formed."""

# pyright: reportConstantRedefinition=false
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.shapes import Float
from .precision import exact_matmul


class Gram(NamedTuple):
    """The five r×r products of one event; each (…, r, r), float64."""

    AA: Float[Tensor, "*batch r r"]  # AᵀA
    BB: Float[Tensor, "*batch r r"]  # BᵀB
    gAgA: Float[Tensor, "*batch r r"]  # g_Aᵀg_A
    gBgB: Float[Tensor, "*batch r r"]  # g_Bᵀg_B
    AGB: Float[Tensor, "*batch r r"]  # Aᵀg_A = AᵀGB = g_BᵀB
    epsilon: float  # unit roundoff of the arithmetic that formed them


def gram_products(
    A: Float[Tensor, "*batch m r"],
    B: Float[Tensor, "*batch n r"],
    grad_A: Float[Tensor, "*batch m r"],
    grad_B: Float[Tensor, "*batch n r"],
) -> Gram:
    """Form the five products in float32 (float64 for float64 input), whatever autocast or TF32 are set to."""
    working = torch.promote_types(A.dtype, torch.float32)
    A, B, grad_A, grad_B = (t.to(working) for t in (A, B, grad_A, grad_B))
    with exact_matmul(A.device):
        products = A.mT @ A, B.mT @ B, grad_A.mT @ grad_A, grad_B.mT @ grad_B, A.mT @ grad_A
    return Gram(*(p.double() for p in products), epsilon=torch.finfo(working).eps)


def product_norm(gram: Gram, d: Float[Tensor, "*batch r"]) -> Float[Tensor, "*batch"]:
    """‖A diag(d) Bᵀ‖_F, one per layer."""
    squared = ((gram.AA * gram.BB) @ d[..., None])[..., 0] * d
    return squared.sum(-1).clamp(min=0).sqrt()
