"""LoRA-RITE's moments of one factor: Adam with r×r second moments, in coordinates that the pair's split cannot change.

Source: arXiv 2410.20625, Algorithm 1.
"""

# pyright: reportConstantRedefinition=false
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.shapes import Float
from .unmagnified import corrected_decay

EPSILON = 1e-6  # the published one, beside the roots of the second moments' eigenvalues


class RiteMoments(NamedTuple):
    """What is kept of a factor (k×r): moments in the coordinates of its partner's basis Q (l×r), and that basis."""

    first: Float[Tensor, "k r"]
    second: Float[Tensor, "r r"]
    escaped: Float[Tensor, ""]
    basis: Float[Tensor, "l r"]


def no_rite_moments(factor: Float[Tensor, "k r"], partner: Float[Tensor, "l r"]) -> RiteMoments:
    """Those of before the first step."""
    r = factor.shape[1]
    zeros = factor.new_zeros
    return RiteMoments(zeros(factor.shape), zeros(r, r), zeros(()), zeros(partner.shape))


def rite_moments(
    former: RiteMoments,
    gradient: Float[Tensor, "k r"],
    basis: Float[Tensor, "l r"],
    step: int,
    betas: tuple[float, float],
    escape: bool = False,
) -> RiteMoments:
    """The moments after step number ``step`` (from 1); the first moments are the step M of the factor.

    Args:
        former: those of the step before, in the basis of then.
        gradient: unmagnified and clipped.
        basis: the partner's Q of now.
        step: how many there were, this one included.
        betas: β₁, β₂.
        escape: add what the second moments lose by each change of the basis to all their eigenvalues (the paper's ρ).
    """
    beta1, beta2 = (corrected_decay(beta, step) for beta in betas)
    P = basis.mT @ former.basis
    second = _symmetric(P @ former.second @ P.mT)
    escaped = former.escaped
    if escape:
        escaped = beta2 * (escaped + _lost(former.second, second))
    second = torch.lerp(_symmetric(gradient.mT @ gradient / len(gradient)), second, beta2)
    values, vectors = torch.linalg.eigh(second.double())
    root = 1 / ((values.clamp_min(0) + escaped).sqrt() + EPSILON)
    whitened = gradient @ ((vectors * root) @ vectors.mT).to(gradient)
    return RiteMoments(torch.lerp(whitened, former.first @ P.mT, beta1), second, escaped, basis)


def _lost(before: Tensor, after: Tensor) -> Tensor:
    """The lesser of the largest fall of an eigenvalue and the fall of their sum; not below zero."""
    fall = torch.linalg.eigvalsh(before.double()) - torch.linalg.eigvalsh(after.double())
    return torch.minimum(fall.max(), fall.sum()).clamp_min(0).to(before)


def _symmetric(S: Tensor) -> Tensor:
    return (S + S.mT) / 2
