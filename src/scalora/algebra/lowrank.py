"""Sums of low-rank products P Qᵀ: their singular values, rank and best truncation, without forming m×n."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.shapes import Float, Int
from .batched import eigh, together

_DEPENDENT = 1e-14  # squared share of a column of norm 1: float32's rounding


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
    if P.ndim == 2:  # what is k×k of several stacks is solved as one
        return Truncated(*(part[0] for part in truncate(P[None], Q[None], rank, settled=settled)))
    return truncate_all([(P, Q)], [rank], [settled])[0]


def truncate_all(
    products: Sequence[tuple[Tensor, Tensor]], ranks: Sequence[int], settled: Sequence[int]
) -> list[Truncated]:
    """As :func:`truncate`, for P (…, m, k) and Q (…, n, k) of several sizes: what is k×k is factorised in one go."""
    sides = [X for pair in products for X in pair]
    bases = _bases(sides, [count for count in settled for _ in range(2)])
    pairs = list(zip(bases[::2], bases[1::2], strict=True))
    # The core's squared singular values to float64's precision are its own to float32's, at half the price of an SVD.
    cores = [basis_P.R @ basis_Q.R.mT for basis_P, basis_Q in pairs]
    solved = together(eigh, [core.mT @ core for core in cores])
    return [
        _best(pair, core, energy.flip(-1).clamp(min=0), V.flip(-1), rank)
        for pair, core, (energy, V), rank in zip(pairs, cores, solved, ranks, strict=True)
    ]


def _best(bases: tuple[_Basis, _Basis], core: Tensor, energy: Tensor, V: Tensor, rank: int) -> Truncated:
    """From the core's squared singular values, descending, and its right singular vectors."""
    basis_P, basis_Q = bases
    dtype = basis_P.rest.dtype
    kept = min(rank, energy.shape[-1])
    sigma = energy[..., None, :kept].sqrt()
    # What rounding made would be orthogonal to nothing.
    root = torch.where(sigma > torch.finfo(dtype).eps * sigma[..., :1], sigma, 0.0).sqrt()
    V = V[..., :kept]
    return Truncated(
        _widen(basis_P.lift(torch.where(root > 0, core @ V / root, 0.0)), rank),
        _widen(basis_Q.lift(V * root), rank),
        energy[..., kept:].sum(-1).to(dtype),
        energy.sum(-1).to(dtype),
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
    """P = basis @ R with orthonormal columns: those of ``first`` divided by their norms, then ``rest @ turn``.

    The product holds however well the settled columns have kept their orthogonality; the basis is as good as that.
    """

    first: Float[Tensor, "*batch m settled"]
    norms: Float[Tensor, "*batch settled"]
    rest: Float[Tensor, "*batch m l"]
    turn: Float[Tensor, "*batch l l"]  # float64
    R: Float[Tensor, "*batch k k"]  # float64

    def lift(self, X: Float[Tensor, "*batch k l"]) -> Float[Tensor, "*batch m l"]:
        """basis @ X."""
        above, below = X.split([self.norms.shape[-1], self.rest.shape[-1]], -2)
        lifted = self.rest @ (self.turn @ below).to(self.rest.dtype)
        if self.norms.shape[-1]:
            norms = self.norms[..., None]
            lifted += self.first @ torch.where(norms > 0, above.to(norms.dtype) / norms, 0.0)
        return lifted


def _bases(sides: Sequence[Tensor], settled: Sequence[int]) -> list[_Basis]:
    """By Gram-Schmidt against the settled columns, twice, and the eigenvectors of what remains, XᵀX, in float64."""
    begun = [_past_the_settled(P, count) for P, count in zip(sides, settled, strict=True)]
    turned = together(_gram_root, [rest.mT.double() @ rest.double() for _, _, rest, _ in begun])
    bases = []
    for (first, norms, rest, along), (turn, R) in zip(begun, turned, strict=True):
        above = torch.cat([torch.diag_embed(norms), norms[..., None] * along], -1).double()
        whole = torch.cat([above, torch.nn.functional.pad(R, (norms.shape[-1], 0))], -2)
        bases.append(_Basis(first, norms, rest, turn, whole))
    return bases


def _past_the_settled(P: Tensor, settled: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The settled columns, their norms, what the others have beside them, and how much of them the others have."""
    first, rest = P[..., :settled], P[..., settled:]
    squares = first.square().sum(-2)
    if not settled:
        return first, squares, rest, P.new_zeros(*P.shape[:-2], 0, rest.shape[-1])
    squares = torch.where(squares > torch.finfo(squares.dtype).tiny, squares, 0.0)  # 1/squares stays finite
    inverse = torch.where(squares > 0, 1 / squares, 0.0)[..., None]
    along = inverse * (first.mT @ rest)
    rest = rest - first @ along
    again = inverse * (first.mT @ rest)
    return first, squares.sqrt(), rest - first @ again, along + again


def _gram_root(gram: Tensor) -> tuple[Tensor, Tensor]:
    """T and R with X = (X T) R and orthonormal columns of X T, from XᵀX (…, l, l) in float64.

    Columns are first brought to norm 1, so that small ones keep their digits. What float32 cannot tell from a
    combination of the others, a share of 1e-7, is left out of both.
    """
    norms = gram.diagonal(dim1=-2, dim2=-1).clamp(min=0).sqrt()
    inverse = torch.where(norms > 0, 1 / norms, 0.0)
    w, V = eigh(gram * inverse[..., :, None] * inverse[..., None, :])
    root = torch.where(w > _DEPENDENT, w, 0.0).sqrt()
    upright = V * torch.where(root > 0, 1 / root, 0.0)[..., None, :]
    return inverse[..., :, None] * upright, (V * root[..., None, :]).mT * norms[..., None, :]


def _widen(factor: Float[Tensor, "*batch m kept"], rank: int) -> Float[Tensor, "*batch m rank"]:
    return torch.nn.functional.pad(factor, (0, rank - factor.shape[-1]))
