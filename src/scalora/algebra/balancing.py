"""How the two matrices of A Bᵀ share its size, and the r×r maps that share it anew without touching the product.

A T and B T⁻ᵀ have the product of A and B for every invertible T. Two choices of T make their Gram matrices equal:
S̃^−½, S̃ being the geometric mean of (BᵀB)⁻¹ and AᵀA (RefLoRA, 2505.18877), and the one by which they become UΣ^½ and
VΣ^½ of the product's singular value decomposition (BaLoRA, as published). Both follow from AᵀA and BᵀB alone.

Batched over leading dimensions (layers), in float64, without waiting for the device. What is zero, or not finite, stays
as it is: with one matrix zero, as LoRA starts, any balance would be that of zero and zero, which has no gradient.
"""

# pyright: reportConstantRedefinition=false
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.shapes import Bool, Float

# Shares of the largest singular value. What is smaller drowns, inverted, in the rounding of a float32 gradient;
_RESOLVED = 1e-4
# and a balance would leave what is smaller no gradient to grow by.
_ALIVE = 1e-6


class FactorGrams(NamedTuple):
    """AᵀA and BᵀB, (…, r, r), float64."""

    AA: Float[Tensor, "*batch r r"]
    BB: Float[Tensor, "*batch r r"]

    @classmethod
    def of(cls, A: Float[Tensor, "*batch m r"], B: Float[Tensor, "*batch n r"]) -> FactorGrams:
        """Formed in float64: their square roots are wanted, which halves the digits."""
        A, B = A.double(), B.double()
        return cls(A.mT @ A, B.mT @ B)


class Refactoring(NamedTuple):
    """S̃ and its inverse, (…, r, r), float64, symmetric positive definite."""

    S: Float[Tensor, "*batch r r"]
    inverse: Float[Tensor, "*batch r r"]


class BalancingMaps(NamedTuple):
    """T for A and T⁻ᵀ for B, (…, r, r), float64."""

    of_A: Float[Tensor, "*batch r r"]
    of_B: Float[Tensor, "*batch r r"]


def refactoring(grams: FactorGrams) -> Refactoring:
    """S̃ = (BᵀB)^−½ [(BᵀB)^½ AᵀA (BᵀB)^½]^½ (BᵀB)^−½, the solution of S̃ BᵀB S̃ = AᵀA; the identity where there is none.

    Singular values, of B and of the product, count as 1e-4 of the largest one where they are smaller.
    """
    usable = _usable(grams)
    AA, BB = (torch.where(usable[..., None, None], gram, _identity(gram)) for gram in grams)
    root, inverse_root = _roots(BB)
    sigma, V = _singular(root @ AA @ root)
    sigma = torch.maximum(sigma, _RESOLVED * sigma[..., -1:])[..., None, :]
    left, right = inverse_root @ V, root @ V
    return Refactoring((left * sigma) @ left.mT, (right / sigma) @ right.mT)


def refactoring_scale(grams: FactorGrams) -> Float[Tensor, "*batch"]:
    """P = (‖A‖_F/‖B‖_F)^½, by which A/P and B·P have one norm; 1 where there is none."""
    AA, BB = (gram.diagonal(dim1=-2, dim2=-1).sum(-1) for gram in grams)
    return torch.where(_usable(grams), (AA / BB).pow(0.25), 1.0)


def balancing_maps(grams: FactorGrams) -> BalancingMaps:
    """T and T⁻ᵀ by which A T = UΣ^½ and B T⁻ᵀ = VΣ^½ with A Bᵀ = UΣVᵀ, descending; identities where Σ is singular."""
    usable = _usable(grams)
    AA, BB = (torch.where(usable[..., None, None], gram, _identity(gram)) for gram in grams)
    root, inverse_root = _roots(BB)
    sigma, V = _singular(root @ AA @ root)
    alive = usable & (sigma[..., 0] > _ALIVE * sigma[..., -1])
    half, V = sigma.flip(-1).sqrt()[..., None, :], V.flip(-1)
    maps = root @ V / half, inverse_root @ V * half
    return BalancingMaps(*(torch.where(alive[..., None, None], each, _identity(each)) for each in maps))


def weighs_more(B: Float[Tensor, "*batch n r"], A: Float[Tensor, "*batch m r"]) -> Bool[Tensor, "*batch"]:
    """Whether ‖B‖_F/n is at least ‖A‖_F/m: where Stable-LoRA goes on shrinking B."""
    size_B, size_A = (torch.linalg.matrix_norm(X) / X.shape[-2] for X in (B, A))
    return size_B >= size_A


def _usable(grams: FactorGrams) -> Bool[Tensor, "*batch"]:
    sizes = torch.stack([gram.diagonal(dim1=-2, dim2=-1).sum(-1) for gram in grams])
    return ((sizes > 0) & torch.isfinite(sizes)).all(0)


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _roots(S: Float[Tensor, "*batch r r"]) -> tuple[Float[Tensor, "*batch r r"], Float[Tensor, "*batch r r"]]:
    """S^½ and S^−½, eigenvalues too small to be resolved raised to the least that is."""
    w, V = torch.linalg.eigh(S)
    half = torch.maximum(w, _RESOLVED**2 * w[..., -1:]).sqrt()[..., None, :]
    return (V * half) @ V.mT, (V / half) @ V.mT


def _singular(M: Float[Tensor, "*batch r r"]) -> tuple[Float[Tensor, "*batch r"], Float[Tensor, "*batch r r"]]:
    """The singular values of a matrix, ascending, and its right singular vectors, from its Gram matrix."""
    w, V = torch.linalg.eigh(M)
    return w.clamp(min=0).sqrt(), V
