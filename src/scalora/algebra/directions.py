"""New adapters from the gradient: Theorem 1 of arXiv 2510.23818, from an SVD or from two thin sketches.

Among all adapters of rank r whose columns have squared norm c, those whose next gradient step comes closest to that of
full fine-tuning have the 2r top singular directions of G = UΣVᵀ between them: Ã = √c·U[:, 𝒜], B̃ = √c·V[:, ℬ] with 𝒜, ℬ
a partition of {1..2r}. Here A takes the 1st, 3rd, … and B the 2nd, 4th, … direction.

G itself is not needed. With Q an orthonormal basis of Y = GΩ for a random Ω (n×k), G ≈ QZᵀ where Z = GᵀQ (Halko,
Martinsson and Tropp, 2011), and the SVD of that is one of a k×k matrix. Both sketches may be sums over many batches,
and over different ones: the second pass then weighs the directions of the first by what they are worth on fresh data.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.shapes import Float
from .batched import orthonormal


class SVD(NamedTuple):
    """G ≈ U diag(σ) Vᵀ, σ descending."""

    U: Float[Tensor, "*batch m k"]
    sigma: Float[Tensor, "*batch k"]
    V: Float[Tensor, "*batch n k"]


class Directions(NamedTuple):
    """Adapters and the gradients G B̃, Gᵀ Ã that belong to them (without the LoRA scale)."""

    A: Float[Tensor, "*batch m r"]
    B: Float[Tensor, "*batch n r"]
    grad_A: Float[Tensor, "*batch m r"]
    grad_B: Float[Tensor, "*batch n r"]


def dense_svd(G: Float[Tensor, "*batch m n"]) -> SVD:
    """The SVD of a gradient that is there in full."""
    U, sigma, Vt = torch.linalg.svd(G, full_matrices=False)
    return SVD(U, sigma, Vt.mT)


def range_basis(Y: Float[Tensor, "*batch m k"]) -> Float[Tensor, "*batch m k"]:
    """An orthonormal basis of the columns of Y = GΩ; k ≤ m."""
    return orthonormal([Y])[0].to(Y)


def sketched_svd(Q: Float[Tensor, "*batch m k"], Z: Float[Tensor, "*batch n k"]) -> SVD:
    """The SVD of QZᵀ from Q with orthonormal columns and Z = GᵀQ; k ≤ min(m, n)."""
    (basis,) = orthonormal([Z])
    U, sigma, Vt = torch.linalg.svd((basis.mT @ Z.double()).mT.to(Z), full_matrices=False)
    return SVD(Q @ U, sigma, basis.to(Z) @ Vt.mT)


def optimal_adapters(svd: SVD, rank: int, c: Float[Tensor, "*batch"] | float) -> Directions:
    """Ã and B̃ of Theorem 1 with squared column norms c, and their gradients; any other halves would do as well.

    Args:
        svd: of G, with at least 2·rank directions.
        rank: r.
        c: one number, or one per matrix of the batch.
    """
    of_A, of_B = slice(0, 2 * rank, 2), slice(1, 2 * rank, 2)
    root = torch.as_tensor(c, dtype=svd.sigma.dtype, device=svd.sigma.device).sqrt()[..., None, None]
    scaled_U, scaled_V = (basis * svd.sigma[..., None, :] for basis in (svd.U, svd.V))
    return Directions(
        root * svd.U[..., of_A], root * svd.V[..., of_B], root * scaled_U[..., of_B], root * scaled_V[..., of_A]
    )
