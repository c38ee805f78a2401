"""Sums of low-rank products P Qᵀ: their singular values, rank and best truncation, without forming m×n."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.shapes import Float, Int


class Truncated(NamedTuple):
    """Balanced factors of the best approximation of the asked rank, and what it leaves out."""

    P: Float[Tensor, "*batch m rank"]
    Q: Float[Tensor, "*batch n rank"]
    discarded: Float[Tensor, "*batch"]  # squared Frobenius norm of the part left out
    total: Float[Tensor, "*batch"]  # squared Frobenius norm before


def truncate(
    P: Float[Tensor, "*batch m k"], Q: Float[Tensor, "*batch n k"], rank: int, *, settled: int = 0
) -> Truncated:
    """The best rank-``rank`` approximation of P Qᵀ (Eckart-Young), as factors of that many columns.

    Args:
        P: (…, m, k); columns of zeros are allowed.
        Q: (…, n, k).
        rank: columns of the result; where fewer directions exist the remaining ones are zero.
        settled: the first so many columns are what an earlier truncation left, orthogonal to one another in P and in
            Q, so that only those after them need a factorisation.
    """
    basis_P, basis_Q = _Basis.of(P, settled), _Basis.of(Q, settled)
    # The core's squared singular values to float64's precision are its own to float32's, at half the price of an SVD.
    core = (basis_P.R @ basis_Q.R.mT).double()
    energy, V = torch.linalg.eigh(core.mT @ core)
    energy, V = energy.flip(-1).clamp(min=0), V.flip(-1)
    kept = min(rank, energy.shape[-1])
    sigma = energy[..., None, :kept].sqrt()
    # What rounding made would be orthogonal to nothing.
    root = torch.where(sigma > torch.finfo(P.dtype).eps * sigma[..., :1], sigma, 0.0).sqrt()
    V = V[..., :kept]
    return Truncated(
        _widen(basis_P.lift(torch.where(root > 0, core @ V / root, 0.0)), rank),
        _widen(basis_Q.lift(V * root), rank),
        energy[..., kept:].sum(-1).to(P.dtype),
        energy.sum(-1).to(P.dtype),
    )


def singular_values(P: Float[Tensor, "*batch m k"], Q: Float[Tensor, "*batch n k"]) -> Float[Tensor, "*batch l"]:
    """The min(m, n, k) largest singular values of P Qᵀ, descending."""
    return torch.linalg.svdvals(torch.linalg.qr(P).R @ torch.linalg.qr(Q).R.mT)


def numerical_rank(sigma: Float[Tensor, "*batch l"], m: int, n: int) -> Int[Tensor, "*batch"]:
    """Number of singular values above max(m, n)·ε·σ_max with float32's ε, as ``torch.linalg.matrix_rank`` counts."""
    return (sigma > max(m, n) * torch.finfo(torch.float32).eps * sigma[..., :1]).sum(-1)


def effective_rank(sigma: Float[Tensor, "*batch l"]) -> Float[Tensor, "*batch"]:
    """exp of the entropy of σ/Σσ (Roy and Vetterli, 2007): how many directions count; 0 where all σ are 0."""
    share = sigma / sigma.sum(-1, keepdim=True).clamp_min(torch.finfo(sigma.dtype).tiny)
    return torch.where(sigma.sum(-1) > 0, torch.special.entr(share).sum(-1).exp(), 0.0)


class _Basis(NamedTuple):
    """P = basis @ R with orthonormal columns: those of ``first`` divided by their norms, then those of ``rest``.

    The product holds however well the settled columns have kept their orthogonality; the basis is as good as that.
    """

    first: Float[Tensor, "*batch m settled"]
    norms: Float[Tensor, "*batch settled"]
    rest: Float[Tensor, "*batch m l"]
    R: Float[Tensor, "*batch _ k"]

    @classmethod
    def of(cls, P: Float[Tensor, "*batch m k"], settled: int) -> _Basis:
        """By Gram-Schmidt against the settled columns, twice, and a QR factorisation of what remains."""
        first, rest = P[..., :settled], P[..., settled:]
        if not settled:
            rest, R = torch.linalg.qr(P)
            return cls(first, first.sum(-2), rest, R)
        squares = first.square().sum(-2)
        squares = torch.where(squares > torch.finfo(squares.dtype).tiny, squares, 0.0)  # 1/squares stays finite
        inverse = torch.where(squares > 0, 1 / squares, 0.0)[..., None]
        along = inverse * (first.mT @ rest)
        rest = rest - first @ along
        again = inverse * (first.mT @ rest)
        rest, R = torch.linalg.qr(rest - first @ again)
        norms = squares.sqrt()
        above = torch.cat([torch.diag_embed(norms), norms[..., None] * (along + again)], -1)
        return cls(first, norms, rest, torch.cat([above, torch.nn.functional.pad(R, (settled, 0))], -2))

    def lift(self, X: Float[Tensor, "*batch _ l"]) -> Float[Tensor, "*batch m l"]:
        """basis @ X."""
        above, below = X.to(self.rest.dtype).split([self.norms.shape[-1], self.rest.shape[-1]], -2)
        lifted = self.rest @ below
        if self.norms.shape[-1]:
            norms = self.norms[..., None]
            lifted += self.first @ torch.where(norms > 0, above / norms, 0.0)
        return lifted


def _widen(factor: Float[Tensor, "*batch m kept"], rank: int) -> Float[Tensor, "*batch m rank"]:
    return torch.nn.functional.pad(factor, (0, rank - factor.shape[-1]))
