"""LoftQ (arXiv 2310.08659, Algorithm 1): a quantised matrix and a low-rank one that come close to W together."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ..common.shapes import Float
from .directions import dense_svd
from .nf4 import NF4, from_nf4, to_nf4


class LoftQStart(NamedTuple):
    """W ≈ Q + P Rᵀ, with P Rᵀ the best approximation of its rank to W − Q."""

    quantised: NF4  # of Q
    P: Float[Tensor, "m r"]
    R: Float[Tensor, "n r"]


def loftq_start(W: Float[Tensor, "m n"], rank: int, steps: int) -> LoftQStart:
    """Alternate ``steps`` times between Q = q(W − P Rᵀ) and the SVD of W − Q, from P Rᵀ = 0; both halves take √Σ.

    Q is rounded to the dtype of W, as its layer will have it; P and R are float32.
    """
    whole = W.float()
    rest = whole
    for _ in range(steps):
        quantised = to_nf4(rest)
        P, R = best_factors(whole - from_nf4(quantised, W).float(), rank)
        rest = whole - P @ R.mT
    return LoftQStart(quantised, P, R)  # pyright: ignore[reportPossiblyUnboundVariable]


def best_factors(lost: Float[Tensor, "m n"], rank: int) -> tuple[Float[Tensor, "m r"], Float[Tensor, "n r"]]:
    """P and R of the best approximation P Rᵀ of ``lost``, float32; each takes √Σ."""
    svd = dense_svd(lost)
    root = svd.sigma[:rank].sqrt()
    return svd.U[:, :rank] * root, svd.V[:, :rank] * root
