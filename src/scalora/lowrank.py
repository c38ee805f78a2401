"""Sums of low-rank products P Qᵀ: their singular values, rank and best truncation, without forming m×n."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._shapes import Float, Int


class Truncated(NamedTuple):
    """Balanced factors of the best approximation of the asked rank, and what it leaves out."""

    P: Float[Tensor, "*batch m rank"]
    Q: Float[Tensor, "*batch n rank"]
    discarded: Float[Tensor, "*batch"]  # squared Frobenius norm of the part left out
    total: Float[Tensor, "*batch"]  # squared Frobenius norm before


def truncate(P: Float[Tensor, "*batch m k"], Q: Float[Tensor, "*batch n k"], rank: int) -> Truncated:
    """The best rank-``rank`` approximation of P Qᵀ (Eckart-Young), as factors of that many columns.

    P: (…, m, k), Q: (…, n, k); columns of zeros are allowed. Where fewer than ``rank`` directions exist the remaining
    columns are zero.
    """
    (basis_P, basis_Q), (U, sigma, Vt) = _svd(P, Q)
    kept = min(rank, sigma.shape[-1])
    root = sigma[..., None, :kept].sqrt()
    energy = sigma.square()
    return Truncated(
        _widen(basis_P @ U[..., :, :kept] * root, rank),
        _widen(basis_Q @ Vt.mT[..., :, :kept] * root, rank),
        energy[..., kept:].sum(-1),
        energy.sum(-1),
    )


def singular_values(P: Float[Tensor, "*batch m k"], Q: Float[Tensor, "*batch n k"]) -> Float[Tensor, "*batch l"]:
    """The min(m, n, k) largest singular values of P Qᵀ, descending."""
    return _svd(P, Q)[1][1]


def numerical_rank(sigma: Float[Tensor, "*batch l"], m: int, n: int) -> Int[Tensor, "*batch"]:
    """Number of singular values above max(m, n)·ε·σ_max with float32's ε, as ``torch.linalg.matrix_rank`` counts."""
    return (sigma > max(m, n) * torch.finfo(torch.float32).eps * sigma[..., :1]).sum(-1)


def effective_rank(sigma: Float[Tensor, "*batch l"]) -> Float[Tensor, "*batch"]:
    """exp of the entropy of σ/Σσ (Roy and Vetterli, 2007): how many directions count; 0 where all σ are 0."""
    share = sigma / sigma.sum(-1, keepdim=True).clamp_min(torch.finfo(sigma.dtype).tiny)
    return torch.where(sigma.sum(-1) > 0, torch.special.entr(share).sum(-1).exp(), 0.0)


def _svd(
    P: Float[Tensor, "*batch m k"], Q: Float[Tensor, "*batch n k"]
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]:
    """Orthonormal bases of the columns of P and of Q, and the SVD of the small core between them."""
    basis_P, R_P = torch.linalg.qr(P)
    basis_Q, R_Q = torch.linalg.qr(Q)
    return (basis_P, basis_Q), torch.linalg.svd(R_P @ R_Q.mT, full_matrices=False)


def _widen(factor: Float[Tensor, "*batch m kept"], rank: int) -> Float[Tensor, "*batch m rank"]:
    return torch.nn.functional.pad(factor, (0, rank - factor.shape[-1]))
