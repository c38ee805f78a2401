"""LoFT's moments of one factor: Adam's of the dense gradient, as far as the factor's partner spans it.

With Y = Q R the partner, G Q Qᵀ is what the factor tells of the dense gradient G. The means of G Q (k×r), and for each
row of G Q those of its outer product with itself (k×r×r), give both moments of every entry of G Q Qᵀ. Where Q turns,
both are carried into the new basis. At full rank they are Adam's.

Source: arXiv 2505.21289, there in coordinates of Y; in those of Q nothing is inverted but R, and rounding is least.
"""

# pyright: reportConstantRedefinition=false
from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..common.shapes import Float
from .unmagnified import corrected_decay

ROWS = 1024  # of the dense update, formed at a time


class LoftMoments(NamedTuple):
    """What is kept of a factor (k×r) whose partner is l×r: moments without bias, and the basis that they are in."""

    first: Float[torch.Tensor, "k r"]
    second: Float[torch.Tensor, "k r r"]
    basis: Float[torch.Tensor, "l r"]


def no_loft_moments(factor: Float[torch.Tensor, "k r"], partner: Float[torch.Tensor, "l r"]) -> LoftMoments:
    """Those of before the first step."""
    k, r = factor.shape
    return LoftMoments(*(factor.new_zeros(shape) for shape in ((k, r), (k, r, r), partner.shape)))


def loft_moments(
    former: LoftMoments,
    gradient: Float[torch.Tensor, "k r"],
    basis: Float[torch.Tensor, "l r"],
    step: int,
    betas: tuple[float, float],
) -> LoftMoments:
    """The moments after step number ``step`` (from 1), from G Q in the partner's basis Q of now."""
    beta1, beta2 = (corrected_decay(beta, step) for beta in betas)
    P = basis.mT @ former.basis
    first = torch.lerp(gradient, former.first @ P.mT, beta1)
    second = torch.baddbmm(
        P @ former.second @ P.mT, gradient[:, :, None], gradient[:, None, :], beta=beta2, alpha=1 - beta2
    )
    return LoftMoments(first, second, basis)


def loft_step(moments: LoftMoments, eps: float, bound: float) -> Float[torch.Tensor, "k r"]:
    """N Q, where N (k×l) is Adam's step m/(√v + ε) of the dense moments; formed a block of rows at a time.

    ``bound`` is :func:`adam_bound`: where rounding leaves too little of v, the entry is cut off there.
    """
    Q, r = moments.basis, moments.basis.shape[1]
    i, j = torch.triu_indices(r, r, device=Q.device)
    products = ((2 - (i == j).to(Q)) * Q[:, i] * Q[:, j]).mT  # v of one row is its second moments times these
    blocks = zip(moments.first.split(ROWS), moments.second.split(ROWS), strict=True)
    steps = [
        (first @ Q.mT).div_((second[:, i, j] @ products).clamp_(min=0).sqrt_().add_(eps)).clamp_(-bound, bound) @ Q
        for first, second in blocks
    ]
    return torch.cat(steps)


def adam_bound(step: int, betas: tuple[float, float]) -> float:
    """The largest that Adam's |m|/√v can be at step number ``step``, whatever the gradients (Cauchy–Schwarz)."""
    beta1, beta2 = betas
    if not beta2:
        return 1.0 if not beta1 else math.inf
    ratio = beta1**2 / beta2
    total = step if ratio == 1 else (1 - ratio**step) / (1 - ratio)
    first, second = ((1 - beta) / (1 - beta**step) for beta in betas)
    return math.sqrt(first**2 / second * total)
