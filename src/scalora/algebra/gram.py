"""The five r×r products that an event reads adapters and gradients through, and what the theorems take from them.

The objective of arXiv 2510.23818 depends on A (m×r), B (n×r), g_A = G B and g_B = GᵀA through these products only, so
that nothing of size m×n is ever formed.
"""

# pyright: reportConstantRedefinition=false
from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.shapes import Bool, Float
from .precision import exact_matmul

TINY = 1e-36  # a squared column norm below this counts as zero: float32 cannot resolve it


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


def joined(grams: Sequence[Gram]) -> Gram:
    """Those of layers of one rank, one after the other, (L, r, r)."""
    if len(grams) == 1:
        return grams[0]
    *products, epsilons = zip(*grams, strict=True)
    return Gram(*(torch.cat(part) for part in products), epsilon=max(epsilons))


def column_norms(gram: Gram) -> Float[Tensor, "*batch k"]:
    """Squared norms of the columns of A, then of B; (…, 2r)."""
    return torch.cat([diagonal(gram.AA), diagonal(gram.BB)], -1)


def influence(gram: Gram) -> Bool[Tensor, "*batch k"]:
    """Whether a column's factor enters the objective: its norm and its partner's gradient are finite and not zero."""
    norms = column_norms(gram)
    grads = torch.cat([diagonal(gram.gBgB), diagonal(gram.gAgA)], -1)
    return (norms > TINY) & (grads > TINY) & torch.isfinite(norms) & torch.isfinite(grads)


def scalar_sums(gram: Gram) -> tuple[Float[Tensor, "*batch"], ...]:
    """p_A = ‖A g_Bᵀ‖², p_B = ‖g_A Bᵀ‖², n_A = ‖g_A‖², n_B = ‖g_B‖², x = ⟨A g_Bᵀ, g_A Bᵀ⟩ = ‖AᵀGB‖² of Theorem 3."""
    p_A = (gram.AA * gram.gBgB).sum((-2, -1))
    p_B = (gram.gAgA * gram.BB).sum((-2, -1))
    x = gram.AGB.square().sum((-2, -1))
    return p_A.clamp(min=0), p_B.clamp(min=0), diagonal(gram.gAgA).sum(-1), diagonal(gram.gBgB).sum(-1), x


def normal_equations(gram: Gram) -> tuple[Float[Tensor, "*batch k k"], Float[Tensor, "*batch k"]]:
    """S and λ of Theorem 5, S v = c·λ in v = [α²; β²]; (…, 2r, 2r) and (…, 2r)."""
    cross = gram.AGB.square()
    upper = torch.cat([gram.AA * gram.gBgB, cross], -1)
    lower = torch.cat([cross.mT, gram.gAgA * gram.BB], -1)
    return torch.cat([upper, lower], -2), torch.cat([diagonal(gram.gBgB), diagonal(gram.gAgA)], -1)


def product_norm(gram: Gram, d: Float[Tensor, "*batch r"]) -> Float[Tensor, "*batch"]:
    """‖A diag(d) Bᵀ‖_F, one per layer."""
    squared = ((gram.AA * gram.BB) @ d[..., None])[..., 0] * d
    return squared.sum(-1).clamp(min=0).sqrt()


def diagonal(S: Float[Tensor, "*batch k k"]) -> Float[Tensor, "*batch k"]:
    """The diagonals of a batch of matrices."""
    return S.diagonal(dim1=-2, dim2=-1)
