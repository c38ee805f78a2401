"""A factor's gradient seen through an orthonormal basis of its partner, whose size and skew then no longer matter.

The gradient of X in W = X Yᵀ (X k×r, Y l×r) is G Y. With Y = Q diag(σ) Vᵀ the *unmagnified* gradient is G Q = G Y V/σ;
a step M in the same coordinates, M Qᵀ of W, is the step M (V/σ)ᵀ of X. Another pair of the same product, X R⁻¹ and
Y Rᵀ, has another Q of the same span, so that what is computed in these coordinates moves W alike.

Source: LoRA-RITE, arXiv 2410.20625, there by QR. The basis of singular vectors says what Y does not span as well.
"""

# pyright: reportConstantRedefinition=false
from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.shapes import Float

CUTOFF = 1e-6  # singular values below this share of the largest count as zero: float32 cannot resolve their vectors


class FactorBasis(NamedTuple):
    """Y = Q diag(σ) Vᵀ of one factor; where σ is zero so is the column of Q, and so is ``inverse``'s, which is V/σ."""

    Q: Float[Tensor, "l r"]
    sigma: Float[Tensor, "r"]
    V: Float[Tensor, "r r"]
    inverse: Float[Tensor, "r r"]

    def unmagnify(self, gradient: Float[Tensor, "k r"]) -> Float[Tensor, "k r"]:
        """G Q from the partner's gradient G Y."""
        return gradient @ self.inverse

    def magnify(self, step: Float[Tensor, "k r"]) -> Float[Tensor, "k r"]:
        """The partner's step S, of least norm, with S Yᵀ = M Qᵀ from M."""
        return step @ self.inverse.mT


def factor_basis(Y: Float[Tensor, "l r"]) -> FactorBasis:
    """The basis of a factor, of its dtype; from YᵀY in float64, so that Q is orthonormal to its dtype's last digits."""
    wide = Y.double()
    values, V = torch.linalg.eigh(wide.mT @ wide)
    sigma = torch.where(values > CUTOFF**2 * values[-1], values, 0.0).clamp_min(0).sqrt()
    inverse = V * torch.where(sigma > 0, 1 / sigma, 0.0)
    return FactorBasis((wide @ inverse).to(Y), sigma.to(Y), V.to(Y), inverse.to(Y))


def corrected_decay(beta: float, step: int) -> float:
    """β(1 − βᵗ⁻¹)/(1 − βᵗ) at step t (from 1): a running mean with it is Adam's, divided by its bias correction."""
    return beta * (1 - beta ** (step - 1)) / (1 - beta**step)
